"""Convert a checkpoint (safetensors, PyTorch or GGUF) into an MLX model folder."""

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .. import cli
from ..files.atomic import new_folder, refuse_existing
from ..files.companions import LICENCES, copy_companions
from ..files.paths import named_path, path_of
from ..selection.tokenizer import open_tokenizer
from ..storage.folder import index_files, resolve, source_of
from ..storage.writer import fill_store
from .gguf.reader import unpack_gguf
from .gguf.shards import write_shards
from .gguf.vocabulary import unpack_sentencepiece

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

DTYPES = ("float16", "bfloat16", "float32")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")

HEAD = "head.safetensors"


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    predictor: str | Path | None = None,
    channel_store: bool = False,
) -> Path:
    """Convert a checkpoint into an MLX model folder.

    About one shard of the output (1 GiB) is in memory at a time, and a tensor twice
    while it is made; the largest tensors are the stacked experts of a mixture. A killed
    conversion leaves no half-written folder.

    Args:
        hf_path: a folder with safetensors or ``pytorch_model.bin``, a Hugging Face
            id, a state dict (``.pt``, ``.bin``) with its config.json beside it, or a
            GGUF file, whose quantised weights are dequantised.
        mlx_path: the folder to make.
        dtype: ``float16``, ``bfloat16`` or ``float32``; default: the source's own,
            ``bfloat16`` for GGUF.
        quantize: whether to quantise the weights; a GGUF file's are quantised anew.
        q_bits: bits per weight; default: 4 for ``affine``, else the mode's own.
        q_group_size: weights per scale; default: 64 for ``affine``, else the mode's.
        q_mode: ``affine``, ``mxfp4``, ``nvfp4`` or ``mxfp8``.
        predictor: a sparsity predictor's folder; default: ``predictor`` in ``hf_path``.
            It is never quantised, so that its choices do not depend on ``quantize``.
        channel_store: make a channel store (:mod:`ifp_mlx.channel_store`); the model is
            on disk twice for a while.

    Returns:
        ``mlx_path``.

    Raises:
        FileExistsError: if ``mlx_path`` is already there.
        FileNotFoundError, ValueError: if the source is incomplete or unsupported.
        ImportError: if it needs PyTorch or gguf and they are not installed.
    """
    target = Path(mlx_path)
    refuse_existing(target)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}.")
    quantization = _quantization(q_bits, q_group_size, q_mode) if quantize else None
    source = path_of(hf_path)
    source = source if source.is_file() else resolve(hf_path)
    second = path_of(predictor) if predictor else source / "predictor"
    if predictor and not (second / HEAD).exists():
        raise FileNotFoundError(
            f"{predictor} has no {HEAD}; give a folder that holds a predictor."
        )
    with new_folder(target) as folder:
        plain = folder / "plain" if channel_store else folder
        plain.mkdir(exist_ok=True)
        _convert_model(source, plain, dtype, quantization)
        if (second / HEAD).exists():
            inner = plain / "predictor"
            inner.mkdir()
            # A predictor that reads the model's own tokens has no tokenizer.
            own = any(second.glob("tokenizer*"))
            _convert_model(second, inner, dtype, None, need_tokenizer=own)
            shutil.copyfile(second / HEAD, inner / HEAD)
        if channel_store:
            fill_store(plain, folder, progress=partial(tqdm, disable=None, leave=False))
            shutil.rmtree(plain)
    return target


def _convert_model(
    source: Path,
    folder: Path,
    dtype: str | None,
    quantization: dict[str, Any] | None,
    *,
    need_tokenizer: bool = True,
) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import save_config

    scratch = folder / "unpacked"
    scratch.mkdir()
    origin, companions = _unpack(source, scratch, dtype)
    copy_companions(companions, folder)
    for name in ("README.md", "ifp_config.json"):
        if (companions / name).is_file():
            shutil.copyfile(companions / name, folder / name)
    config = source_of(origin).config
    if need_tokenizer and not (folder / "tokenizer.json").exists():
        unpack_sentencepiece(companions, folder)
    elif need_tokenizer:
        open_tokenizer(companions, config)  # refuses a broken one
    model = source_of(origin).dense()
    if dtype is not None:
        _cast(model, getattr(mx, dtype))
        config.pop("dtype", None)  # its name since transformers 5
        config["torch_dtype"] = dtype
    if quantization is not None:
        model, config = _quantized(model, config, quantization, origin)
    weights = tree_flatten(model.parameters(), destination={})
    del model
    write_shards(folder, _handed_over(weights), count=len(weights))
    save_config(config, folder / "config.json")
    shutil.rmtree(scratch)


def _handed_over(
    weights: dict[str, "mx.array"],
) -> Iterator[tuple[str, "mx.array"]]:
    """Yield the weights without keeping them, since evaluated ones take memory."""
    while weights:
        name = next(iter(weights))
        yield name, weights.pop(name)


def _cast(model: "nn.Module", dtype: "mx.Dtype") -> None:
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    # Some models keep a few parameters, such as a router's, in full precision.
    may_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and may_cast(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantization(
    bits: int | None, group_size: int | None, mode: str
) -> dict[str, Any]:
    """Return the options of a quantised model, with the mode's defaults filled in."""
    import mlx.core as mx

    width = 1024
    try:
        if min(1 if n is None else n for n in (bits, group_size)) < 1:
            raise ValueError("both numbers must be positive.")  # MLX would crash
        packed, scales, *_ = mx.quantize(
            mx.zeros((1, width)), group_size=group_size, bits=bits, mode=mode
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"q_bits={bits}, q_group_size={group_size} and q_mode={mode!r} do not go "
            f"together: {error}"
        ) from error
    return {
        "group_size": width // scales.shape[-1],
        "bits": packed.shape[-1] * 32 // width,
        "mode": mode,
    }


def _quantized(
    model: "nn.Module", config: dict[str, Any], options: dict[str, Any], origin: Path
) -> tuple["nn.Module", dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    if "quantization" in config:
        raise ValueError(
            f"{origin} is already quantised {config['quantization']}; "
            "leave -q out, or convert the original checkpoint."
        )
    group = options["group_size"]
    for name, module in model.named_modules():
        # mlx-lm would silently leave such a layer as it is.
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % group:
            raise ValueError(
                f"{name} is {module.weight.shape[-1]} wide, not a multiple of "
                f"q_group_size={group}; choose another --q-group-size or leave -q out."
            )
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        return quantize_model(
            model, config, group, options["bits"], mode=options["mode"]
        )


def _unpack(source: Path, scratch: Path, dtype: str | None) -> tuple[Path, Path]:
    """Return a folder with safetensors, and the one with the files beside them.

    Other formats are first rewritten to ``scratch``.
    """
    import mlx.core as mx

    if source.is_dir():
        folder, files = source, _state_dict_files(source)
        if not files:
            return folder, folder
    elif _starts_with(source, b"GGUF"):
        # Gemma overflows in float16, hence bfloat16.
        unpack_gguf(source, scratch, getattr(mx, dtype or "bfloat16"))
        for pattern in LICENCES:  # a GGUF file does not contain them
            for file in source.parent.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        return scratch, scratch
    else:
        folder, files = source.parent, [source]
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing, without which {source.name} is no "
            "model; put the model's config.json and tokenizer beside it."
        )
    shutil.copyfile(folder / "config.json", scratch / "config.json")
    # Each file is opened twice, and closed before the next, since it may be large.
    count = sum(len(_state_dict(file)) for file in files)
    tensors = chain.from_iterable(map(_tensors, files))
    write_shards(scratch, tensors, count=count)
    return scratch, folder


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _state_dict_files(folder: Path) -> list[Path]:
    """Return the PyTorch files of a folder, or none if it has safetensors."""
    if any(folder.glob("model*.safetensors")):
        return []
    index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        return index_files(index)
    if (folder / "pytorch_model.bin").exists():
        return [folder / "pytorch_model.bin"]
    files = [f for end in ("pt", "pth", "bin") for f in folder.glob(f"*.{end}")]
    if len(files) != 1:
        names = ", ".join(sorted(file.name for file in files)) or "no weights"
        raise FileNotFoundError(
            f"{folder} holds {names}; give a folder with model*.safetensors or "
            "pytorch_model.bin, or the path of one state dict or GGUF file."
        )
    return files


def _state_dict(file: Path) -> Mapping[str, Any]:
    """Open a pickled state dict; its tensors stay on disk, and no code of it runs."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file} is a PyTorch file; to read it: pip install 'ifp-mlx[torch]'"
        ) from error
    zipped = _starts_with(file, b"PK")  # since PyTorch 1.6; only these can be mapped
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # from pickle, zip and torch, of many kinds
        if "Cannot allocate memory" in str(error):  # mmap found no address space
            raise OSError(
                f"{file} has {file.stat().st_size / 1e9:.1f} GB, and this system does "
                "not let a file of that size be mapped into memory; save the model in "
                "several files, best as safetensors."
            ) from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"holds {code[1]}, not only tensors"
            if code
            else "is damaged, or no state dict"
        )
        raise ValueError(
            f"{file} {why}; it was not read: save the model's state_dict() again, "
            "best as safetensors."
        ) from error
    for key in 2 * ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{file} holds a {type(content).__name__}, not the tensors of a model; "
            "save the model's state_dict()."
        )
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{name} in {file} is a {type(tensor).__name__}, not a tensor; "
                "save the model's state_dict()."
            )
    return content


def _tensors(file: Path) -> Iterator[tuple[str, "mx.array"]]:
    import mlx.core as mx
    import torch

    for name, tensor in _state_dict(file).items():
        bfloat16 = tensor.dtype == torch.bfloat16  # unknown to numpy
        try:
            plain = tensor.detach().contiguous()
            plain = (plain.view(torch.int16) if bfloat16 else plain).numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} in {file} is a {tensor.dtype} tensor that MLX cannot "
                "take; convert it to float first."
            ) from error
        array = mx.array(plain)
        yield name, array.view(mx.bfloat16) if bfloat16 else array


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = cli.Parser(prog="from_pytorch.py", description=__doc__)
    parser.add_argument(
        "--hf-path",
        required=True,
        help="model folder or Hugging Face id, state dict file, or GGUF file",
    )
    parser.add_argument(
        "--mlx-path", type=named_path, required=True, help="the folder to make"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights; default: the source's own, bfloat16 for GGUF",
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantise; the quantised weights of a GGUF file are dequantised first",
    )
    parser.add_argument("--q-bits", type=int, help="bits per weight; default: 4")
    parser.add_argument(
        "--q-group-size",
        type=int,
        help="weights per scale; default: 64 for affine, else the mode's own",
    )
    parser.add_argument(
        "--q-mode", choices=MODES, default="affine", help="default: affine"
    )
    parser.add_argument(
        "--channel-store",
        action="store_true",
        help="lay the FFN out channel by channel, so that only chosen ones are read; "
        "python -m ifp_mlx.channel_store orders them by tasks, too",
    )
    parser.add_argument(
        "--predictor",
        help="folder of a sparsity predictor, to go into MLX_PATH/predictor; its "
        "weights are not quantised",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run ``ifp_mlx convert``: convert, and print where the result is."""
    cli.main(build_parser(), lambda args: print(convert(**vars(args))), argv)
