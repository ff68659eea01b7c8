"""What a selection costs in quality: teacher-forced, beside the dense model.

Every row is a conversation whose last message is the reference answer. The dense model
and the pruned one read the same prompt and the same answer, token by token, and are
compared at each answer token:

- nll: of the reference answer under the pruned model, nats per token;
- kl: from the dense model's next-token distribution to the pruned one's, nats;
- agreement: how often both would have chosen the same token.

The prompt is read by the pruned model too, as `generate` does it, or by the dense one
(`--prefill dense`), as GRIFFIN does it. Means are taken over rows, then over files, so
that every file (a family of tasks) counts the same.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from . import cli
from .data import Message, tokenize
from .masks import Allocation
from .model import IFPModel, load
from .pruning import MaskedFFN, mask_model, set_masks

METRICS = ("nll", "kl", "agreement")

# setting → file → metric → one value a row
Results = dict["Setting", dict[str, dict[str, list[float]]]]


@dataclass(frozen=True)
class Row:
    """One example: token ids of the prompt, template included, and of the answer."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Setting:
    """One way of selecting, to be compared with others."""

    selector: str
    keep: float
    allocation: Allocation


def read_rows(
    path: Path,
    tokenizer: Any,
    *,
    limit: int | None = None,
    answer_tokens: int | None = None,
) -> list[Row]:
    """Read a JSONL file of mlx-lm's formats: chat (``messages``, the last one the
    answer), completions (``prompt``, ``completion``) or plain ``text``, whose second
    half is the answer to its first and which no chat template touches.

    Args:
        path: the file.
        tokenizer: mlx-lm's.
        limit: rows to take from the start; ``None`` takes all.
        answer_tokens: compare this many tokens of an answer at most.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line has neither format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[:limit], start=1):
        try:
            row = _read_row(json.loads(line), tokenizer)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"Line {number} of {path} is no example: give messages that end with "
                "an assistant's, or prompt and completion, or text."
            ) from error
        rows.append(Row(row.prompt, row.answer[:answer_tokens]))
    return [row for row in rows if row.prompt and row.answer]


def _read_row(example: dict[str, Any], tokenizer: Any) -> Row:
    if "text" in example:
        tokens = list(tokenizer.encode(example["text"]))
        return Row(tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :])
    prompt, answer = _split(example)
    tokens = list(tokenizer.encode(answer, add_special_tokens=False))
    return Row(tokenize(tokenizer, prompt), tokens)


def _split(example: dict[str, Any]) -> tuple[list[Message], str]:
    if "messages" not in example:
        prompt = {"role": "user", "content": example["prompt"]}
        return [prompt], example["completion"]
    *prompt_messages, answer = example["messages"]
    if answer["role"] != "assistant" or not prompt_messages:
        raise ValueError("no answer")
    return prompt_messages, answer["content"]


class Evaluator:
    """Holds one model whose masks change, so that nothing is loaded twice.

    Masked and sliced logits are equal by test, which makes this the quality of the
    compact model.

    Args:
        model: from :func:`ifp_mlx.load`; its dense weights stay in memory here.
        dense_prefill: whether the prompt is read by the dense model.
    """

    def __init__(self, model: IFPModel, *, dense_prefill: bool = False) -> None:
        self.model = model
        self.dense_prefill = dense_prefill
        self._dense = model.dense()
        self._masked: list[MaskedFFN] = mask_model(self._dense)
        self._ones = mx.ones((model.layers, 1))

    def reference(self, row: Row) -> mx.array:
        """Return the dense model's log-probabilities at the answer, ``[A, V]``."""
        return self._log_probabilities(row, self._ones, self._ones)

    def measure(
        self, row: Row, mask: mx.array, reference: mx.array
    ) -> dict[str, float]:
        """Return the metrics of one row.

        Args:
            row: ``A`` answer tokens.
            mask: ``[L, F]``.
            reference: from :meth:`reference`, ``[A, V]``.
        """
        before = self._ones if self.dense_prefill else mask
        found = self._log_probabilities(row, before, mask)
        truth = mx.array(row.answer)[:, None]
        kl = (mx.exp(reference) * (reference - found)).sum(axis=-1)
        same = found.argmax(axis=-1) == reference.argmax(axis=-1)
        return {
            "nll": float(-mx.take_along_axis(found, truth, axis=-1).mean()),
            "kl": float(kl.mean()),
            "agreement": float(same.astype(mx.float32).mean()),
        }

    def masks(
        self, row: Row, settings: Sequence[Setting], seed: int = 0
    ) -> Iterator[tuple[Setting, mx.array]]:
        """Yield each setting's mask, ``[L, F]``; a selector scores the row once."""
        model = self.model
        scores: dict[str, mx.array] = {}
        for setting in settings:
            name = setting.selector
            if name not in scores:
                set_masks(self._masked, self._ones)
                scores[name] = model.scores(
                    row.prompt, name, seed=seed, dense=self._dense
                )
            selection = model.select(
                row.prompt,
                keep=setting.keep,
                selector=name,
                allocation=setting.allocation,
                scores=scores[name],
            )
            yield setting, selection.mask()

    def _log_probabilities(
        self, row: Row, before: mx.array, after: mx.array
    ) -> mx.array:
        """Return ``[A, V]``, one mask holding for the prompt, one for the answer.

        The prompt's last token, which gives the first answer token, belongs to the
        prompt.
        """
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._dense)
        set_masks(self._masked, before)
        logits = [self._dense(mx.array(row.prompt)[None], cache=cache)[0, -1:]]
        mx.eval(logits, [layer.state for layer in cache])
        if len(row.answer) > 1:
            set_masks(self._masked, after)
            logits += [self._dense(mx.array(row.answer[:-1])[None], cache=cache)[0]]
        found = mx.concatenate(logits).astype(mx.float32)
        log_probabilities = nn.log_softmax(found, axis=-1)
        mx.eval(log_probabilities)
        return log_probabilities


def evaluate(
    model: IFPModel,
    files: dict[str, list[Row]],
    settings: Sequence[Setting],
    *,
    dense_prefill: bool = False,
    seed: int = 0,
    progress: Any = iter,
) -> Results:
    """Measure every setting on every row.

    Args:
        model: from :func:`ifp_mlx.load`.
        files: rows by the name of their file.
        settings: what to compare.
        dense_prefill: whether the prompt is read by the dense model.
        seed: of the selector ``random``.
        progress: wraps the iteration over rows.

    Returns:
        For each setting and file, each metric's value on every row.
    """
    evaluator = Evaluator(model, dense_prefill=dense_prefill)
    results: Results = {
        setting: {name: {m: [] for m in METRICS} for name in files}
        for setting in settings
    }
    rows = [(name, row) for name, rows in files.items() for row in rows]
    for name, row in progress(rows):
        reference = evaluator.reference(row)
        for setting, mask in evaluator.masks(row, settings, seed):
            found = evaluator.measure(row, mask, reference)
            for metric, value in found.items():
                results[setting][name][metric].append(value)
    return results


def summary(results: Results) -> dict[Setting, dict[str, float]]:
    """Return the macro mean of every metric: over rows, then over files."""
    return {
        setting: {
            metric: float(np.mean([np.mean(values[metric]) for values in files]))
            for metric in METRICS
        }
        for setting, by_name in results.items()
        for files in [list(by_name.values())]
    }


def table(results: Results) -> str:
    """Return the summary as a Markdown table."""
    head = "| selector | keep | allocation | NLL | KL to dense | agreement |"
    rows = [head, "|---|---|---|---|---|---|"]
    for setting, mean in summary(results).items():
        rows.append(
            f"| {setting.selector} | {setting.keep:g} | {setting.allocation} "
            f"| {mean['nll']:.3f} | {mean['kl']:.3f} | {mean['agreement']:.1%} |"
        )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Run ``python -m ifp_mlx.evaluate``."""
    cli.main(build_parser(), _command, argv)


def build_parser() -> cli.Parser:
    """Return the command's parser."""
    parser = cli.Parser(
        prog="ifp_mlx.evaluate",
        description="Compare selectors, keeps and allocations with the dense model on "
        "prompts with reference answers.",
    )
    cli.add_model_option(parser)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--data", required=True, **many, help="JSONL files, one per family of tasks")
    add("--keep", type=float, default=[0.75, 0.5], **many, help="default: 0.75 0.5")
    add("--selector", default=["activation", "random"], **many)
    add("--allocation", default=["uniform", "first-layer"], **many)
    add("--limit", type=int, help="rows per file; default: all")
    add("--answer-tokens", type=int, help="compare so many of an answer at most")
    add(
        "--prefill",
        choices=("compact", "dense"),
        default="compact",
        help="which model reads the prompt; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="of the selector random")
    add("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def _command(args: Any) -> None:
    model, tokenizer = load(args.model)
    paths = [Path(name) for name in args.data]
    read = partial(
        read_rows,
        tokenizer=tokenizer,
        limit=args.limit,
        answer_tokens=args.answer_tokens,
    )
    files = {path.stem: read(path) for path in paths}
    if empty := [name for name, rows in files.items() if not rows]:
        raise ValueError(f"{', '.join(empty)} hold no example; give other files.")
    choices = itertools.product(args.selector, args.keep, args.allocation)
    results = evaluate(
        model,
        files,
        [Setting(*choice) for choice in choices],
        dense_prefill=args.prefill == "dense",
        seed=args.seed,
        progress=partial(tqdm, disable=None, leave=False),
    )
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in files.items())
    print(f"{model.name}; rows: {counts}; prompt read by the {args.prefill} model\n")
    print(table(results))
    if args.json:
        named = [
            {"setting": setting.__dict__, "mean": mean, "rows": results[setting]}
            for setting, mean in summary(results).items()
        ]
        print(json.dumps({"prefill": args.prefill, "results": named}))


if __name__ == "__main__":
    main()
