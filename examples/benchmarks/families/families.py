"""Try every model type of mlx-lm that can be built; write families.md.

    python examples/benchmarks/families/families.py

Small random models of mlx-lm's own classes, from the configs in families.json, so
nothing is fetched. For each, at full precision and at 4 bits in groups of 32: whether
masking and slicing the same units gives the same logits, whether keeping every unit
gives the stock logits bit for bit, and whether a compact model with equally many units
in every layer is a stock model of a changed config.json, which any program can load.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ifp_mlx.selection.masks import Selection
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.shapes import Plan, Unsliceable
from ifp_mlx.slicing.sliced import group_size, slice_model
from ifp_mlx.slicing.stock import build

CONFIGS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).with_suffix(".md")
TOKENS = [5, 9, 77, 200, 13, 40]
TOLERANCE = 1e-5
GROUP, BITS = 32, 4

# Model types of mlx-lm without a config here, and the reason.
NOT_TRIED = {
    "bitnet": "runs on Metal alone; its FFN has a norm across the channels",
    "muse_spark": "runs on Metal alone",
    "olmo": "wants the package ai2-olmo",
    "phi3small": "writes to fixed token ids, so that no small model of it runs",
    "prism_hadamard_qwen35": "is made for one model's packed weights",
}


class Verdict(NamedTuple):
    """The result for one model type.

    Attributes:
        unit: what is selected; empty if the type is refused.
        refused: why nothing can be selected, or ``None``.
        error: largest relative difference of masked and sliced logits.
        whole: whether keeping every unit gives the stock logits bit for bit.
        plain: whether a slice with equally many units is a stock model.
        quantised: the same difference at 4 bits, or ``None`` if it was not tried.
    """

    unit: str
    refused: str | None
    error: float = 0.0
    whole: bool = False
    plain: bool = False
    quantised: float | None = None

    @property
    def works(self) -> bool:
        """Whether this type can be used."""
        errors = [self.error, self.quantised or 0.0]
        return self.refused is None and self.whole and max(errors) <= TOLERANCE


def configs() -> dict[str, dict[str, Any]]:
    """Return the config.json of a small model of every type, by name."""
    return json.loads(CONFIGS.read_text(encoding="utf-8"))


def random_model(config: dict[str, Any], *, quantised: bool = False) -> nn.Module:
    """Return a small random fp32 model of mlx-lm's own class."""
    model = build(config)
    rng = np.random.default_rng(0)
    weights = [
        (name, mx.array(rng.normal(0, 0.3, value.shape).astype(np.float32)))
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    model.eval()
    if quantised:
        nn.quantize(model, GROUP, BITS, class_predicate=_fits_groups)
    return model


def judge(config: dict[str, Any]) -> Verdict:
    """Try one model type."""
    model = random_model(config)
    try:
        plan = plan_of(model, config)
    except Unsliceable as reason:
        return Verdict("", str(reason).split("cannot be sliced ", 1)[1].rstrip("."))
    sliced, selection = random_model(config), half_of(plan)
    error, whole = compared(model, sliced, plan, selection)
    quantised = _quantised_difference(config, plan)
    plain = is_plain(config, plan, sliced, selection.sizes[0])
    return Verdict(plan.unit, None, error, whole, plain, quantised)


def _quantised_difference(config: dict[str, Any], plan: Plan) -> float | None:
    """Return the difference of :func:`compared` at 4 bits; ``None`` where mlx-lm's own
    class cannot be quantised, or does not run when it is.
    """
    try:
        packed = random_model(config, quantised=True)
        mx.eval(packed(mx.array([TOKENS])))
    except (TypeError, ValueError):
        return None
    selection = half_of(plan, group_size(packed, plan))
    sliced = random_model(config, quantised=True)
    return compared(packed, sliced, plan, selection)[0]


def half_of(plan: Plan, group: int = 1) -> Selection:
    """Return about half of the units of every layer, another half in each."""
    rng = np.random.default_rng(1)
    blocks = plan.units // group
    indices = []
    for _ in plan.layers:
        kept = np.sort(rng.permutation(blocks)[: max(1, blocks // 2)])
        index = (kept[:, None] * group + np.arange(group)).ravel()
        indices.append(mx.array(index.astype(np.int32)))
    return Selection(tuple(indices), None, plan.units, unit=plan.unit)


def compared(
    model: nn.Module, sliced: nn.Module, plan: Plan, selection: Selection
) -> tuple[float, bool]:
    """Mask one of two equal models and slice the other.

    Returns:
        How far their logits are apart, as a share of the largest; whether masks that
        keep every unit give the stock logits bit for bit.

    Raises:
        ValueError: if masking changes nothing, so that nothing was tried.
    """
    tokens = mx.array([TOKENS])
    stock, masked = model(tokens), mask_model(model, plan)
    set_masks(masked, mx.ones(plan.shape))
    whole = bool(mx.array_equal(model(tokens), stock))
    set_masks(masked, selection.mask())
    expected = model(tokens)
    if not mx.abs(stock - expected).max() > 0:
        raise ValueError(f"Masking {type(model).__module__} changed nothing.")
    slice_model(sliced, plan, selection)
    error = mx.abs(sliced(tokens) - expected).max() / mx.abs(expected).max()
    return float(error), whole


def is_plain(config: dict[str, Any], plan: Plan, compact: nn.Module, kept: int) -> bool:
    """Return whether a slice is the stock model of a changed config.json."""
    if plan.key is None:
        return False
    stock = build(plan.resized(config, kept))
    shapes = {name: w.shape for name, w in tree_flatten(compact.parameters())}
    if shapes != {name: w.shape for name, w in tree_flatten(stock.parameters())}:
        return False
    stock.load_weights(tree_flatten(compact.parameters()))
    stock.eval()
    tokens = mx.array([TOKENS])
    return bool(mx.array_equal(stock(tokens), compact(tokens)))


def _fits_groups(path: str, module: nn.Module) -> bool:
    # Some classes multiply with the table of a tied embedding as it is.
    table = isinstance(module, nn.Embedding) or not hasattr(module, "to_quantized")
    return not table and module.weight.shape[-1] % GROUP == 0


def page(verdicts: dict[str, Verdict]) -> str:
    """Return families.md."""
    from importlib.metadata import version

    minor = ".".join(version("mlx-lm").split(".")[:2])
    works = {name for name, verdict in verdicts.items() if verdict.works}
    types = {name.split(",")[0] for name in works}
    lines = [
        "# Which model types work",
        "",
        f"{len(types)} of mlx-lm's model types, in {len(works)} shapes, tried on small random",
        f"models of its own classes (mlx-lm {minor}, float32) by",
        "`python examples/benchmarks/families/families.py`, which wrote this page; a test holds",
        "the page to it. Real models were tried only for llama (SmolLM2) and gemma3_text",
        "(Gemma 3).",
        "",
        "*Unit*: what is selected, channels of the FFN or experts; in a model with both,",
        "experts, while its dense FFNs stay whole. *Same*: masked and sliced logits differ",
        "by at most 1e-5 of the largest logit. *4 bits*: the same, with every matrix except the",
        "embeddings quantised in groups of 32, and with whole groups of channels or any experts",
        "kept; not tried where mlx-lm's own class does not run at 4 bits.",
        "*Whole*: keeping every unit gives the stock logits bit for bit. *Plain*: a compact",
        "model with equally many units in every layer is a stock model of another",
        "config.json, so `ifp_mlx.compact` can write it as a plain folder; the others are",
        "compact in memory only.",
        "",
        "| model type | unit | same | 4 bits | whole | plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, verdict in sorted(verdicts.items()):
        if verdict.refused is None:
            cells = [verdict.error <= TOLERANCE, None, verdict.whole, verdict.plain]
            if verdict.quantised is not None:
                cells[1] = verdict.quantised <= TOLERANCE
            marks = ("not tried" if c is None else "yes" if c else "no" for c in cells)
            lines.append(f"| {name} | {verdict.unit} | {' | '.join(marks)} |")
    lines += ["", "Refused, with the reason given:", "", "| model type | why |"]
    lines += ["|---|---|"]
    for name, verdict in sorted(verdicts.items()):
        if verdict.refused is not None:
            lines.append(f"| {name} | {verdict.refused} |")
    lines += ["", "Not tried:", "", "| model type | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in sorted(NOT_TRIED.items())]
    lines += [
        "",
        "This needs no list of types or of matrix names: a model's class is built at two sizes,",
        "and what differs in shape is cut (`ifp_mlx/slicing/shapes.py`). As a check, a small",
        "random copy of one of a real model's layers is first masked and cut; the model is",
        "refused if the two differ. gemma3n as released keeps the",
        "largest channels of its first layers, a choice that depends on all of them.",
        "",
        "How experts are chosen by a text: [experts](../../guides/experts.md).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    verdicts = {name: judge(config) for name, config in configs().items()}
    PAGE.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
