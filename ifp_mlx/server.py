"""An OpenAI-compatible server: the command."""

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from . import cli
from .engine import Engine, IFPError
from .selection.request import Request


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.server``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.server",
        description="Serve a model over the OpenAI API; each request's instruction, "
        "or the task it names, chooses the channels or experts.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_adapter_option(parser)
    cli.add_tasks_folder_option(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind; default: %(default)s")
    add("--port", type=int, default=8080, help="0 takes a free one; default: 8080")
    add("--model-name", help="the name that requests use; default: its own")
    add(
        "--prepare",
        metavar="NAME=INSTRUCTION",
        action="append",
        default=[],
        help="prepare a task before serving; may be repeated",
    )
    add(
        "--keep",
        type=cli.keep_of,
        help="kept share, or auto, for requests that have none",
    )
    add("--api-key", help="require this key; better in $IFP_MLX_API_KEY")
    add(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="serve requests to this Host too; * is any",
    )
    add("--context-length", type=int, help="tokens; default: the model's own")
    add("--max-queue", type=int, default=64, help="waiting requests; default: 64")
    add("--max-body", type=int, default=1 << 20, help="bytes; default: 1 MiB")
    add("--batch", type=int, default=16, help="requests decoded together; default: 16")
    add("--memory-limit", type=int, metavar="BYTES", help="refuse what exceeds it")
    add("--cache-bytes", type=int, help="compact models kept; default: half of memory")
    add("--prompt-cache-bytes", type=int, default=256 << 20, help="default: 256 MiB")
    cli.add_decoding_options(parser, "where a request says nothing", prefill_step=256)
    cli.add_kv_options(parser)
    add("--grace", type=int, default=10, help="seconds that answers get when stopped")
    return parser


def _command(args: argparse.Namespace) -> None:
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            "The server needs starlette, uvicorn and pydantic: "
            "pip install 'ifp-mlx[server]'."
        ) from error
    from .openai.api import LOOPBACK, Policy, make_app
    from .openai.asked import Defaults

    for name in ("max_queue", "max_body", "batch"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)} must be at least 1.")
    decoding = cli.decoding_of(args)
    Request(keep=args.keep)  # refused now, not with every request
    with Engine.open(
        args.model,
        adapter_path=args.adapter_path,
        memory_limit=args.memory_limit,
        cache_bytes=args.cache_bytes,
        prompt_cache_bytes=args.prompt_cache_bytes,
        context_length=args.context_length,
        max_queue=args.max_queue,
        batch=args.batch,
        prefill_step=args.prefill_step_size,
        **cli.kv_of(args),
    ) as engine:
        _prepare(engine, args)
        policy = Policy(
            name=args.model_name or engine.name,
            api_key=args.api_key or os.environ.get("IFP_MLX_API_KEY"),
            hosts=(*LOOPBACK, args.host, *(name.lower() for name in args.allow_host)),
            max_body=args.max_body,
            libraries=tuple(cli.tasks_folders(args)),
            defaults=Defaults(args.keep, decoding, args.chat_template_config or {}),
        )
        config = uvicorn.Config(
            make_app(engine, policy),
            host=args.host,
            port=args.port,
            log_level="warning",
            timeout_graceful_shutdown=args.grace,
            # Longer than clients keep an idle connection, or both end it at once
            # and a request is lost between them.
            timeout_keep_alive=75,
        )
        _serve(uvicorn.Server(config), policy.name)


def _prepare(engine: Engine, args: argparse.Namespace) -> None:
    """Make the library's tasks known, and prepare those of ``--prepare``."""
    for folder in cli.tasks_folders(args):
        for file in sorted(folder.glob("*.safetensors")):
            try:
                engine.prepare(mask_file=str(file), name=file.stem, load=False)
            except IFPError as error:
                print(f"{file} is left out: {error}", file=sys.stderr)
    for pair in tqdm(args.prepare, desc="tasks", disable=None, leave=False):
        name, equals, instruction = pair.partition("=")
        if not (name and equals and instruction.strip()):
            raise ValueError(f"--prepare {pair!r} is not of the form NAME=INSTRUCTION.")
        engine.prepare(instruction, name=name, keep=args.keep)


def _serve(server: Any, name: str) -> None:
    """Serve until SIGINT or SIGTERM, which let running answers end first."""
    listener = server.config.bind_socket()
    listener.listen(128)
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    line = f"{name} is served at {url}/v1, with a chat page at {url}/"
    print(line, file=sys.stderr, flush=True)
    # uvicorn raises the signal again once it has stopped; nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
