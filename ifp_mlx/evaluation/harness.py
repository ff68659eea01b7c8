"""Tasks of lm-evaluation-harness on a model that selects units for them.

mlx_lm has an adapter of its own; this one adds nothing but the masks. They are chosen
for each request, from the text that it gives to read, or once for a task, from examples
that are not evaluated or from the task's description. The prompt is read by the compact
model. A compensated one is really made; otherwise the masked dense model stands for it.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM

from ..model.checkpoint import IFPModel
from ..model.decide import decide
from ..selection.masks import Selection
from ..selection.prompts import known_tokens, tokenize
from ..slicing import reading
from ..slicing.compensation import TEXT_TOKENS
from ..slicing.masked import mask_model, set_masks
from .log import Log
from .shares import DENSE
from .shares import compare as compare_values
from .teacher import Setting

EXAMPLES = 16
KEY = ("arm", "task")
By = Literal["input", "task"]

# task → metric → one value a document
Scores = dict[str, dict[str, list[float]]]


class SelectingLM(MLXLM):
    """mlx_lm's adapter; the selection decides which model it runs.

    Args:
        model: from :func:`ifp_mlx.load`; its dense weights stay in memory here.
        batch_size: sequences that are generated at once, under one mask.
        chat: whether requests go through the chat template.
        max_tokens: to generate, instead of what a task says.
        seed: of the selector ``random``.
    """

    def __init__(
        self,
        model: IFPModel,
        *,
        batch_size: int = 8,
        chat: bool | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        LM.__init__(self)  # MLXLM's own would load a model
        has_template = model.tokenizer.has_chat_template
        self._ifp, self._dense, self.tokenizer = model, model.dense(), model.tokenizer
        self._model = self._dense
        self._masked = mask_model(self._dense, model.plan)
        self._ones = mx.ones((model.layers, 1))
        self._max_tokens, self._batch_size, self._sampler = max_tokens, batch_size, None
        self.use_chat_template = has_template if chat is None else chat
        self._seed = seed
        self._setting: Setting | None = None
        self._task_masks: dict[str, Selection] | None = None

    def use(self, setting: Setting | None, tasks: dict[str, Any] | None = None) -> None:
        """Set how requests select from now on.

        Args:
            setting: how to select; ``None`` leaves the model dense.
            tasks: name → lm-eval's object, of tasks that get one mask each; ``None``
                selects request by request.

        Raises:
            ValueError: if a task has nothing to make a mask from.
        """
        self._setting, self._task_masks = setting, None
        self._run(None)
        if setting is not None and tasks is not None:
            masks = {name: self._mask_of_task(task) for name, task in tasks.items()}
            self._task_masks = masks

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """See lm-eval; where masks go by request, :meth:`_process_prompt` sets them."""
        return self._by_task(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """See lm-eval.

        Raises:
            ValueError: without a mask for the task: here no prompt could select.
        """
        if self._setting is not None and self._task_masks is None:
            raise ValueError(
                f"The task {requests[0].task_name} scores whole texts, which have no "
                "prompt to select by; give --select-by task."
            )
        return self._by_task(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """See lm-eval; where masks go by request, requests go one by one."""
        with redirect_stdout(sys.stderr):  # mlx_lm prints its progress
            if self._setting is None or self._task_masks is not None:
                return self._by_task(requests, super().generate_until)
            texts = []
            for request in requests:
                self._select(self._tokenize([request.args[0]])[0])
                texts += super().generate_until([request])
            return texts

    def _process_prompt(self, prompt: Sequence[int], step_size: int = 2048) -> Any:
        """Select by the text before all continuations of one request."""
        if self._setting is not None and self._task_masks is None:
            self._select(prompt)
        return super()._process_prompt(prompt, step_size)

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenise everything that is read; refuse tokens beyond the embedding."""
        found: list[tuple[int, ...]] = super()._tokenize(texts)
        for tokens in found:
            known_tokens(tokens, self._ifp.vocabulary)
        return found

    def _by_task(self, requests: list[Any], answer: Callable[[list], list]) -> list:
        if self._task_masks is None:
            return answer(requests)
        answers = []
        for name, group in groupby(requests, lambda request: request.task_name):
            self._run(self._task_masks[name])
            answers += answer(list(group))
        return answers

    def _run(self, selection: Selection | None) -> None:
        """Answer with the compact model of a selection, or without one the dense
        model.
        """
        if selection is not None and selection.compensates:
            self._model = self._ifp.compact(selection)
            return
        self._model = self._dense
        set_masks(self._masked, self._ones if selection is None else selection.mask())

    def _select(self, tokens: Sequence[int]) -> None:
        self._run(None)
        assert self._setting is not None
        if self._setting.compensate:
            request = self._setting.request(tokens, self._seed)
            self._model = self._ifp.prepare(decide(request, self._ifp)).model
            return
        name = self._setting.selector
        options: dict[str, Any] = {"seed": self._seed, "dense": self._dense}
        scores = self._ifp.scores(list(tokens), name, **options)
        self._run(self._selection(list(tokens), name, scores, list(tokens)))

    def _mask_of_task(self, task: Any) -> Selection:
        self._run(None)
        texts = task_texts(task, self.tokenizer, chat=self.use_chat_template)
        scores = reading.scores(
            self._dense, self._ifp.plan, [(text,) for text in texts]
        )
        # The scores are known; "activation" keeps the gates binary.
        return self._selection([0], "activation", scores, sum(texts, [])[:TEXT_TOKENS])

    def _selection(
        self, tokens: list[int], selector: str, scores: mx.array, text: list[int]
    ) -> Selection:
        """Return a selection, compensated by a text where the setting says so."""
        assert self._setting is not None
        selection = self._ifp.select(
            tokens,
            keep=self._setting.keep,
            selector=selector,
            allocation=self._setting.allocation,
            scores=scores,
        )
        if not self._setting.compensate:
            return selection
        return selection.compensated(text, "what selects")


def task_texts(task: Any, tokenizer: Any, *, chat: bool) -> list[list[int]]:
    """Return the token ids that a task's mask is made from: question and answer of
    examples that are not evaluated, else the task's description.

    Args:
        task: lm-eval's object.
        tokenizer: mlx-lm's.
        chat: whether the task's requests go through the chat template.

    Raises:
        ValueError: if the task has neither.
    """
    description = task.config.description or ""
    docs = _unseen_docs(task)
    pairs = [(description + str(task.doc_to_text(d)), _target(task, d)) for d in docs]
    if not pairs and not description.strip():
        raise ValueError(
            f"The task {task.config.task} has no description, and no examples but those "
            "it evaluates, to make a mask from; give --select-by input."
        )
    delimiter = "" if chat else task.config.target_delimiter
    texts = []
    for question, answer in pairs or [(description, "")]:
        message = [{"role": "user", "content": question}]
        tokens = tokenize(tokenizer, message, chat_template=chat)
        rest = tokenizer.encode(delimiter + answer, add_special_tokens=False)
        texts.append(tokens + list(rest))
    return texts


def _unseen_docs(task: Any) -> list[Any]:
    config = task.config
    evaluated = config.test_split or config.validation_split
    if task.has_training_docs():
        docs = task.training_docs()
    elif config.fewshot_split not in (None, evaluated):
        docs = task.fewshot_docs()
    else:
        return []
    return [doc for doc, _ in zip(docs, range(EXAMPLES), strict=False)]


def _target(task: Any, doc: Any) -> str:
    target = task.doc_to_target(doc)
    if isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    return str(target[0] if isinstance(target, list) else target)


def open_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Return name → lm-eval's object of the tasks asked for.

    Args:
        names: of tasks, groups or tags.
        folder: with YAML files of more tasks.

    Raises:
        ValueError: if there is no such task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None:
        own = TaskManager(include_defaults=False, include_path=str(folder))
        if all(own.match_tasks([name]) for name in names):
            return own.load(list(names))["tasks"]
    # Its own index of 14,000 tasks takes a while.
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        where = "" if folder is None else f", nor in {folder}"
        raise ValueError(
            f"There is no task {', '.join(unknown)} in lm-eval{where}; give the folder "
            "of its YAML file as --harness-path."
        )
    return manager.load(list(names))["tasks"]


def measure(
    model: IFPModel,
    tasks: dict[str, Any],
    settings: Sequence[Setting],
    log: Log,
    *,
    by: By,
    limit: int | None = None,
    shots: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> None:
    """Evaluate the dense model and each setting on the tasks the log does not have.

    Args:
        model: from :func:`ifp_mlx.load`.
        tasks: from :func:`open_tasks`.
        settings: ways of selecting; task masks ignore the selector.
        log: results so far, with the key :data:`KEY`.
        by: what a mask is for, a request or a task.
        limit: documents per task, from the start.
        shots: examples in the prompt, instead of what a task says.
        max_tokens: to generate, instead of what a task says.
        seed: of the selector ``random``.
    """
    lm: SelectingLM | None = None
    for setting in (None, *settings):
        arm = DENSE if setting is None else arm_name(setting, by)
        todo = {name: task for name, task in tasks.items() if (arm, name) not in log}
        if not todo:
            continue
        lm = lm or SelectingLM(model, max_tokens=max_tokens, seed=seed)
        lm.use(setting, todo if by == "task" else None)
        for name, metrics in run(lm, todo, limit=limit, shots=shots).items():
            log.add({"arm": arm, "task": name, "metrics": metrics})


def arm_name(setting: Setting, by: By) -> str:
    """Return what tables call a setting; with a mask for each task, the setting's
    selector is not used and not named.
    """
    if by == "input":
        return setting.label
    name = f"task mask, keep {setting.keep:g}, {setting.allocation}"
    return f"{name}, compensated" if setting.compensate else name


def compare(
    tasks: Iterable[str], settings: Sequence[Setting], log: Log, by: By
) -> dict[str, dict[str, Any]]:
    """Return "task, metric" → arm → :func:`.shares.compare`."""
    arms = [DENSE, *(arm_name(setting, by) for setting in settings)]
    result: dict[str, dict[str, Any]] = {}
    for task in tasks:
        dense = log.lines[DENSE, task]["metrics"]
        for metric, values in dense.items():
            result[f"{task}, {metric}"] = {
                arm: compare_values(log.lines[arm, task]["metrics"][metric], values)
                for arm in arms
            }
    return result


def run(
    lm: SelectingLM,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    shots: int | None = None,
) -> Scores:
    """Evaluate tasks as the model is set now.

    Args:
        lm: set by :meth:`SelectingLM.use`.
        tasks: from :func:`open_tasks`.
        limit: documents per task, from the start.
        shots: examples in the prompt, instead of what a task says.
    """
    found = simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),  # they are open already
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=lm.use_chat_template,
        bootstrap_iters=0,  # the intervals here are paired, and our own
    )
    assert found is not None  # None only where several processes share the work
    return {task: by_metric(lines) for task, lines in found["samples"].items()}


def by_metric(samples: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Return metric → one value a document, of metrics that are plain numbers.

    With several filters of the answers, the metrics of each carry its name.
    """
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    several = len({sample["filter"] for sample in samples}) > 1
    values: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], bool | int | float):
                name = f"{metric}, {sample['filter']}" if several else metric
                values.setdefault(name, []).append(float(sample[metric]))
    return values


def chance(task: Any) -> float | None:
    """Return how often a blind guess is right, of a task with choices, else ``None``."""
    if task.config.output_type != "multiple_choice":
        return None
    docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
    sizes = [
        len(task.doc_to_choice(doc)) for doc, _ in zip(docs, range(100), strict=False)
    ]
    return sum(1 / size for size in sizes) / len(sizes)
