"""The files an app needs beside a package: tokenizer, configuration, manifest, card."""

import json
from pathlib import Path
from typing import Any

from ...files.companions import UNKNOWN_LICENCE, copy_companions, licence_of
from ...model.checkpoint import IFPModel
from ...selection.masks import Selection

VERSIONED = ("ifp-mlx", "mlx", "mlx-lm", "coremltools")


def write_companions(
    folder: Path,
    model: IFPModel,
    selections: dict[str, Selection],
    manifest: dict[str, Any],
) -> None:
    """Write the files beside a package.

    Args:
        folder: where to; the masks go to its folder ``masks``.
        model: the source of the package.
        selections: by function name.
        manifest: the content of manifest.json, which the card shows too.
    """
    copy_companions(model.path, folder)
    # Swift reads the chat template in tokenizer_config.json and nowhere else.
    tokenizer = _read(folder / "tokenizer_config.json")
    template = model.path / "chat_template.jinja"
    if "chat_template" not in tokenizer and template.is_file():
        tokenizer["chat_template"] = template.read_text(encoding="utf-8")
    _write(folder / "tokenizer_config.json", tokenizer)
    _write(folder / "config.json", _config(model, selections))
    if not (folder / "generation_config.json").exists():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        known = {key: model.config[key] for key in ids if key in model.config}
        _write(folder / "generation_config.json", known)
    masks = folder / "masks"
    masks.mkdir()
    for name, selection in selections.items():
        selection.save(masks / f"{name}.safetensors")
    _write(folder / "manifest.json", manifest)
    (folder / "README.md").write_text(_card(manifest), encoding="utf-8")


def describe(model: IFPModel, selections: dict[str, Selection]) -> dict[str, Any]:
    """Return the facts of a package that follow from its source."""
    from importlib.metadata import version

    return {
        "base_model": model.name,
        "licence": licence_of(model.path),
        "functions": {
            name: {
                "mask_id": selection.mask_id,
                "layers": selection.sizes,
                "channels": selection.channels,
                "selection": selection.as_text(),
            }
            for name, selection in selections.items()
        },
        "versions": {name: version(name) for name in VERSIONED},
    }


def summary(report: dict[str, Any]) -> str:
    """Return the command's words on a package: its size, and how it was verified."""
    sizes = report["bytes"]
    words = [f"{sizes['package'] / 1e6:.1f} MB"]
    if len(report["functions"]) > 1:
        words[0] += f" ({sizes['separate'] / 1e6:.1f} MB as separate packages)"
    for name, about in report["functions"].items():
        check = about.get("verification")
        if check is None:
            words.append(f"{name} was not verified")
            continue
        same = "the same" if check["tokens_equal"] else "other"
        words.append(
            f"{name}: logits within {check['max_logit_error']:.2%} of MLX's and {same} "
            f"greedy tokens over {check['decode_steps']} decode steps"
        )
    return "; ".join(words)


def _config(model: IFPModel, selections: dict[str, Selection]) -> dict[str, Any]:
    widths = {selection.target_size for selection in selections.values()}
    config = {k: v for k, v in model.config.items() if not k.startswith("quantization")}
    if len(widths) == 1 and None not in widths:
        inner = config if "intermediate_size" in config else config["text_config"]
        inner["intermediate_size"] = widths.pop()
    return config


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _card(manifest: dict[str, Any]) -> str:
    licence = manifest["licence"] or UNKNOWN_LICENCE
    functions = "\n".join(
        f"| `{name}` | `{about['mask_id']}` | {sum(about['layers'])} of "
        f"{about['channels'] * len(about['layers'])} FFN channels |"
        for name, about in manifest["functions"].items()
    )
    versions = ", ".join(" ".join(pair) for pair in manifest["versions"].items())
    how = manifest["quantisation"]
    checks = [about.get("verification") for about in manifest["functions"].values()]
    errors = [check["max_logit_error"] for check in checks if check]
    words = {
        "licence": licence,
        "functions": functions,
        "versions": versions,
        "weights": f"{how['bits']}-bit blocks of {how['group_size']}"
        if how
        else "float16",
        "surplus": ""
        if manifest["consumer"] == "default"
        else ", end one more than the tokens so far, as swift-transformers sends it",
        "verified": f"run in an interpreter: logits within {max(errors):.2g} of MLX's, as "
        "a share of the largest"
        if errors
        else "not verified",
    }
    return CARD.format(**manifest | words)


CARD = """# {base_model}, compact, for Core ML

Part of {base_model} (licence: {licence}): for each function the FFN channels that one
instruction needs. Needs iOS 18 or macOS 15. Weights: {weights}.

| function | mask | kept |
|---|---|---|
{functions}

Inputs: `inputIds`, int32 [1, q], q at most {query_length}; `causalMask`, float16
[1, 1, q, end]{surplus}, added to the scores on top of causality, so zeros will do.
States `keyCache` and `valueCache` hold {context_length} positions; make one per
conversation, stop before they are full, and send a longer prompt in pieces. Output:
`logits`, float16 [1, q, vocabulary].

Made with {versions}. The saved package was {verified}. It was not run on a Mac.
"""
