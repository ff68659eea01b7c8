"""Select, load and answer: the command."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from . import cli
from .files.paths import named_path
from .files.progress import SHOWN
from .files.texts import decoded
from .model.checkpoint import load
from .model.compact_cache import CompactCache
from .model.generation import stream_generate
from .model.responses import GenerationResponse, report
from .selection.prompts import as_messages
from .slicing.stock import context_of


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.generate``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser; names are mlx_lm's wherever it has one."""
    parser = cli.Parser(
        prog="ifp_mlx.generate",
        description="Load what an instruction needs, FFN channels or experts of a mixture, "
        "and generate.",
    )
    cli.add_model_option(parser, shipped=True)
    cli.add_adapter_option(parser)
    add = parser.add_argument
    add("--prompt", "-p", required=True, help="the user's message; - reads stdin")
    add("--system-prompt", help="system message, put before the prompt")
    cli.add_selection_options(parser)
    cli.add_compensate_option(parser, "where it is read anyway, to select")
    add(
        "--memory-gb",
        type=float,
        help="memory for the compact model and its KV cache, in 10^9 bytes (the process "
        "takes some more): --keep auto keeps no more units than fit, the model is read "
        "layer by layer, and the result is kept for the next time",
    )
    add(
        "--prefill",
        choices=("auto", "compact", "dense"),
        default="auto",
        help="which model reads the prompt; dense has the whole model in memory "
        "meanwhile, unless it reads the prompt to select; auto: dense where that reads "
        "it to select, else compact; default: %(default)s",
    )
    cli.add_check_options(parser)
    add(
        "--cache-folder",
        type=named_path,
        help="for these results; default: ~/.cache/ifp_mlx",
    )
    add(
        "--save-mask",
        type=named_path,
        metavar="FILE",
        help="write the selection as a mask file",
    )
    add("--max-tokens", "-m", type=int, default=100, help="default: %(default)s")
    cli.add_decoding_options(parser)
    cli.add_kv_options(parser)
    add(
        "--prompt-cache-file",
        metavar="FILE",
        help="the prompt goes on where the text in this file ends, which is not read "
        "again; if there is no such file yet, it is written when the prompt was read; "
        "it belongs to the mask, so give the same --instruction or --mask-file",
    )
    add("--ignore-chat-template", action="store_true", help="prompt as plain text")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def _command(args: Any) -> None:
    prompt = args.prompt
    if prompt == "-":
        prompt = decoded(sys.stdin.buffer.read(), "The text on stdin")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1.")
    as_messages(prompt)  # an empty prompt is refused before anything is loaded
    memory = cli.bytes_of(args.memory_gb)
    how: dict[str, Any] = {"check": cli.check_of(args.check), "reselect": args.reselect}
    how |= {"draft_tokens": args.draft_tokens, "memory_bytes": memory}
    request = cli.request_of(args, prefill=args.prefill, **how)
    decoding = cli.decoding_of(args) | cli.kv_of(args)
    model, tokenizer = load(args.model, args.adapter_path)
    steps = stream_generate(
        model,
        tokenizer,
        prompt,
        request=request,
        system_prompt=args.system_prompt,
        cache=CompactCache(args.cache_folder),
        chat_template=not args.ignore_chat_template,
        prompt_cache_file=args.prompt_cache_file,
        progress=SHOWN,
        max_tokens=args.max_tokens,
        prefill_step_size=args.prefill_step_size,
        **decoding,
    )
    text, last = _print_stream(steps)
    print(_summary(last), file=sys.stderr)
    _say_checks(last)
    _say_length(last, context_of(model.config))
    cli.say_quality(last.selection, model.card, request)
    slicing = model.slicing(last.selection)
    cli.say_slicing(slicing, last.selection)
    if args.json:
        promise = model.card and model.card.promise(last.selection.share)
        more = {"down_proj": slicing, "promise": promise}
        print(json.dumps({"text": text} | report(last) | more))
    if args.save_mask:  # last: if that fails, the answer has been given
        last.selection.save(args.save_mask)


def _say_length(last: GenerationResponse, context: int | None) -> None:
    """Say on stderr that a text is longer than those the model was made for."""
    length = last.prompt_tokens + last.generation_tokens
    if context is not None and length > context:
        print(
            f"Note: prompt and answer have {length} tokens, and the model was made for "
            f"{context}: expect a poor answer; shorten the prompt.",
            file=sys.stderr,
        )


def _say_checks(last: GenerationResponse) -> None:
    """Say on stderr what checking took."""
    if (check := last.check) is None:
        return
    answer = last.generation_tokens / max(check.checks, 1)
    print(
        f"Checked ({check.mode}): {check.accepted} of {check.drafted} drafted tokens "
        f"stood, {answer:.2f} tokens a check, "
        f"{(check.bytes_read - check.prompt_bytes_read) / last.generation_tokens / 1e6:.1f} "
        "MB of dropped channels read a token.",
        file=sys.stderr,
    )


def _print_stream(
    steps: Iterable[GenerationResponse],
) -> tuple[str, GenerationResponse]:
    pieces = []
    for step in steps:
        print(step.text, end="", flush=True)
        pieces.append(step.text)
    print(flush=True)
    return "".join(pieces), step


def _summary(last: GenerationResponse) -> str:
    selection, seconds = last.selection, last.seconds
    total = selection.channels * len(selection.sizes)
    return (
        f"{sum(selection.sizes)} of {total} {selection.unit}s, chosen by "
        f"{selection.origin.selector} ({selection.origin.allocation}), mask "
        f"{selection.mask_id}; select {seconds.select:.2f} s, load {seconds.load:.2f} s, "
        f"prefill {last.prompt_tokens} tokens {seconds.prefill:.2f} s, decode "
        f"{last.generation_tokens} tokens {seconds.decode:.2f} s "
        f"({last.generation_tps:.1f} tokens/s)"
    )


if __name__ == "__main__":
    main()
