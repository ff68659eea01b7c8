"""Task masks: named masks to keep, made once from a few examples or an instruction.

If the checkpoint has a trained predictor, its mean scores for the examples' prompts
choose, with the gates that the model was trained with. Otherwise a task mask is chosen
by what prompts and answers use together, over all examples, so it also has the units
that only answers need, which no prompt can show. It then keeps the first tokens of its
examples, from which the kept channels can learn to make up for the dropped ones.

A task mask is an ordinary mask file. It says how it was made and, if that was measured,
what it costs. A folder of task masks is a library (`--task NAME` in other commands).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..files.progress import ProgressBar
from ..model.checkpoint import IFPModel
from ..selection import profiles
from ..selection.masks import Origin, Selection
from ..selection.request import SAFE_KEEP
from ..slicing.compensation import TEXT_TOKENS
from .rows import Row, selecting_tokens
from .teacher import METRICS, Evaluator

# The scores that a task mask is made from: of the units' use, or the predictor's.
USE, PREDICTOR = "activation", "predictor"


@dataclass(frozen=True)
class TaskMask:
    """A named selection, and the scores it was made from.

    Attributes:
        selection: its ``origin`` holds ``task`` (the name), ``made`` and, once measured,
            ``evaluation``; its ``text`` is the beginning of the examples.
        scores: ``[L, F]``, so that tasks can be merged.
    """

    selection: Selection
    scores: mx.array

    @property
    def name(self) -> str:
        """What ``--task`` calls it."""
        return str(self.selection.origin.task)

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """Its measured cost, from :func:`measure`, or ``None``."""
        return self.selection.origin.evaluation

    def save(self, folder: Path) -> Path:
        """Write it into a library and return the file; one of its name is replaced."""
        path = folder / f"{self.name}.safetensors"
        self.selection.save(path, scores=self.scores)
        return path

    @staticmethod
    def load(path: Path) -> "TaskMask":
        """Read a task mask.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no mask file, or a mask that is not of a task.
        """
        selection = Selection.load(path)
        scores = cast(dict[str, mx.array], mx.load(str(path))).get("scores")
        if scores is None or selection.origin.task is None:
            raise ValueError(
                f"{path} is a mask, but not of a task: it keeps no scores; make one "
                "with python -m ifp_mlx.tasks make."
            )
        return TaskMask(selection, scores.astype(mx.float32))


def make(
    model: IFPModel,
    name: str,
    examples: Sequence[Row],
    *,
    progress: ProgressBar = iter,
    **size: Any,
) -> TaskMask:
    """Make a task mask from examples of a task.

    Args:
        model: from :func:`ifp_mlx.load`.
        name: what to call the task.
        examples: prompts and answers; an answer may be empty, and a predictor reads
            only prompts.
        progress: wraps the iteration over examples.
        size: ``keep`` or ``target_size``, and ``allocation``, of a :class:`Request`.

    Raises:
        ValueError: if there are no examples, or the name cannot be a file's.
    """
    check_name(name)
    if not examples:
        raise ValueError(f"The task {name} has no examples; give at least one.")
    pairs = [(row.prompt, row.answer) for row in examples]
    if model.predictor is None:
        selector, scores = USE, model.use_scores(pairs, progress=progress)
        tokens = sum(len(prompt) + len(answer) for prompt, answer in pairs)
    else:
        asked = [selecting_tokens(row, model.tokenizer) for row in examples]
        found = [model.scores(tokens, PREDICTOR) for tokens in progress(asked)]
        selector, scores = PREDICTOR, mx.stack(found).mean(axis=0)
        tokens = sum(map(len, asked))
    about = {"selector": selector, "examples": len(examples), "tokens": tokens}
    text = sum(([*prompt, *answer] for prompt, answer in pairs), [])[:TEXT_TOKENS]
    return _task(model, name, scores, about, text, **size)


def merge(
    model: IFPModel,
    name: str,
    tasks: Sequence[TaskMask],
    **size: Any,
) -> TaskMask:
    """Make one mask for several tasks, of the size of one.

    In every layer each task counts the same: its scores are shares of the energy that
    its own texts have there. A predictor's scores have the same spread for every task,
    so there a channel gets its highest score, that of the task that needs it most.

    Args:
        model: the one that the tasks were made with.
        name: what to call the merged task.
        tasks: at least two.
        size: ``keep`` or ``target_size``, and ``allocation``, of a :class:`Request`.

    Raises:
        ValueError: if there are fewer than two tasks, or one is of another model, or
            some have the scores of a predictor and others not.
    """
    check_name(name)
    if len(tasks) < 2:
        raise ValueError(f"{name} merges {len(tasks)} task(s); name two or more.")
    for task in tasks:
        model.check_fits(task.selection)
    predicted = [task.name for task in tasks if task.selection.origin.predicted]
    others = [task.name for task in tasks if task.name not in predicted]
    if predicted and others:
        raise ValueError(
            f"{predicted[0]} has the scores of a trained predictor and {others[0]} has "
            "not, and the two cannot be compared; make both again with this model."
        )
    selector = PREDICTOR if predicted else USE
    each = TEXT_TOKENS // len(tasks)
    text = sum((list(task.selection.text or ())[:each] for task in tasks), [])
    about = {"selector": selector, "merged": [task.name for task in tasks]}
    scores = _together([task.scores for task in tasks], selector)
    return _task(model, name, scores, about, text, **size)


def _together(scores: Sequence[mx.array], selector: str) -> mx.array:
    """Return the scores of several tasks at once, ``[L, F]``."""
    found = mx.stack(list(scores))
    if selector == PREDICTOR:
        return found.max(axis=0)
    square = mx.square(found)
    return mx.sqrt((square / square.sum(axis=-1, keepdims=True)).sum(axis=0))


def adopt(
    model: IFPModel, name: str, profile: str | bytes, **size: float | None
) -> TaskMask:
    """Make a task mask from a profile of experts that another tool wrote.

    Args:
        model: a mixture.
        name: what to call the task.
        profile: the text, see :mod:`ifp_mlx.selection.profiles`.
        size: ``keep`` or ``target_size``, where the profile only ranks experts.

    Raises:
        ValueError: if it is no profile of this model, or keeps what a stock model
            cannot have.
    """
    check_name(name)
    if model.plan.unit != "expert":
        raise ValueError(
            f"{model.name} has no experts that could be selected; a profile is for a "
            "mixture of experts."
        )
    said = profiles.read(profile, model.plan.paths, model.channels)
    asked = {option: value for option, value in size.items() if value is not None}
    if said.sizes is None:
        scores, about = mx.array(said.scores), {"form": said.form}
        return _task(model, name, scores, about, [], **asked)
    if asked:
        raise ValueError(
            f"The profile says itself which experts are kept; leave out {min(asked)}."
        )
    selection = said.selection()
    origin = Origin(allocation="uniform", keep=selection.share)
    selection = replace(
        selection,
        origin=origin,
        fingerprint=model.fingerprint,
        adapter=model.adapter,
    )
    model.check_fits(selection)
    return _named(model, name, selection, mx.array(said.scores), {"form": said.form})


def measure(
    model: IFPModel,
    task: TaskMask,
    rows: Sequence[Row],
    *,
    progress: ProgressBar = iter,
) -> TaskMask:
    """Measure a task mask on examples; return it with its evaluation card, which also
    says, as ``compensated``, what it costs when its text makes up for dropped channels.

    Args:
        model: the one that it was made with.
        task: what to measure.
        rows: examples that it was not made from.
        progress: wraps the iteration over rows.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError(
            f"No example is left to measure the task {task.name} on; give others than "
            "those it is made from."
        )
    selection = task.selection
    evaluator, mask, compensated = Evaluator(model), selection.mask(), None
    if selection.text is not None:
        compensated = model.compact(selection.compensated())
    plain, better = [], []
    for row in progress(rows):
        reference = evaluator.reference(row)
        plain.append(evaluator.measure(row, mask, reference))
        if compensated is not None:
            better.append(evaluator.compare(row, compensated, reference))
    card: dict[str, Any] = _means(plain) | {"rows": len(rows)}
    card |= {"compensated": _means(better)} if better else {}
    origin = replace(selection.origin, evaluation=card)
    return replace(task, selection=replace(selection, origin=origin))


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {metric: float(np.mean([f[metric] for f in found])) for metric in METRICS}


def overlap(a: Selection, b: Selection) -> np.ndarray:
    """Return the overlap of two selections and its chance level, ``[L, 2]``.

    The overlap of a layer is the shared part of the smaller selection. Two random
    selections share k/F of it on average, where the larger one keeps ``k`` units.
    """
    rows = []
    for one, other in zip(a.indices, b.indices, strict=True):
        small, large = sorted((one.size, other.size))
        both = np.intersect1d(np.array(one), np.array(other)).size
        rows.append((both / small, large / a.channels))
    return np.array(rows)


def library(folder: Path) -> list[TaskMask]:
    """Return the tasks in a folder, by name; other masks in it are left out.

    Raises:
        ValueError: if there is no task mask in it.
    """
    tasks = []
    for path in sorted(folder.glob("*.safetensors")):
        if Selection.load(path).origin.task is not None:
            tasks.append(TaskMask.load(path))
    if not tasks:
        raise ValueError(
            f"There is no task mask in {folder}; make one with python -m ifp_mlx.tasks "
            "make, or give another --tasks-folder."
        )
    return tasks


def _task(
    model: IFPModel,
    name: str,
    scores: mx.array,
    about: dict[str, Any],
    text: list[int],
    **size: Any,
) -> TaskMask:
    asked = [size.get(name) for name in ("keep", "target_size")]
    if asked == [None, None] and model.ifp.target_size is None:
        size |= {"keep": SAFE_KEEP}  # nothing here could say what is enough
    # The tokens select nothing, since the scores are known. The selector decides
    # whether there are gates.
    selector = about.get("selector", USE)
    selection = model.select([0], selector=selector, scores=scores, **size)
    return _named(model, name, selection, scores, about, text)


def _named(
    model: IFPModel,
    name: str,
    selection: Selection,
    scores: mx.array,
    about: dict[str, Any],
    text: Sequence[int] = (),
) -> TaskMask:
    from datetime import UTC, datetime
    from importlib.metadata import version

    about["date"] = datetime.now(UTC).date().isoformat()
    about["versions"] = {n: version(n) for n in ("ifp_mlx", "mlx", "mlx-lm")}
    origin = replace(
        selection.origin, selector="task", task=name, made=about, model=model.name
    )
    if model.plan.unit == "channel" and selection.gates is None:
        selection = replace(
            selection, text=tuple(text) or None
        )  # to make up for others
    selection = replace(selection, origin=origin)
    return TaskMask(selection, scores)


def check_name(name: str) -> None:
    """Raise ``ValueError`` if a task's name cannot be a file's."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"name={name!r} cannot be a task's: use letters, digits, '-', '_' and '.'."
        )
