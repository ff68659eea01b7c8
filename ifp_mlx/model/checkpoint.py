"""A checkpoint folder as an object: select units, make the compact model."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checking.drift import RECENT
from ..checking.rollback import Rollback
from ..checking.whole import Whole
from ..files.atomic import new_file
from ..files.paths import path_of
from ..files.progress import CALIBRATION, ProgressBar, named
from ..selection.calibration import MOST_TOKENS, calibration_chats
from ..selection.config import CONFIG_FILE, IFPConfig
from ..selection.masks import Origin, Selection
from ..selection.predictor import SparsityPredictor
from ..selection.prompts import (
    Message,
    Prompt,
    as_messages,
    ids_of,
    instruction_of,
    known_tokens,
    tokenize,
)
from ..selection.request import Request
from ..selection.scores import blend_scores, random_scores
from ..selection.tokenizer import open_tokenizer
from ..selection.top_k import select
from ..selection.widths import MEASURED_SHARES
from ..slicing import reading
from ..slicing.apart import set_apart_all
from ..slicing.compensation import Evidence, merit
from ..slicing.reading import Example
from ..slicing.routing import mass_share
from ..slicing.sliced import Donor, cuts_groups, fill_model, group_sizes, share_core
from ..slicing.stock import IN_LAYER, context_of, final_norm, vocabulary_of
from ..storage.adapter import Adapter
from ..storage.folder import SHIPPED, Folder, resolve, source_of
from . import sweep
from .agreement import check_agreement, compared, places_of
from .card import Card, load_card, save_card
from .decide import decide
from .decision import Decision
from .experts import check_selection
from .footprint import Footprint
from .sweep import Choose

PRIOR_FILE, PREDICTOR_FOLDER = "prior.safetensors", "predictor"
SENSITIVITY_FILE = "sensitivity.safetensors"


class Compact(NamedTuple):
    """A selection and the small model it makes.

    Attributes:
        selection: what is kept.
        model: an ordinary mlx-lm model, its weights in memory.
        whole: the dense model beside it, where that checks it; ``model`` then has its
            parts apart (:mod:`ifp_mlx.slicing.apart`).
        kv: the dense model's KV cache of the instruction, if it read that.
        select: seconds to the selection; a sweep loads too, so there these are the
            seconds of the whole sweep.
        load: seconds of reading and slicing.
        cache: ``hit`` if it was on disk already, ``miss`` if it was swept and kept
            there.
    """

    selection: Selection
    model: nn.Module
    kv: list[Any] | None = None
    select: float = 0.0
    load: float = 0.0
    cache: str | None = None
    whole: Whole | None = None


class IFPModel:
    """A large model on disk, from which an instruction's units can be loaded.

    No weight stays in memory: :meth:`select` and :meth:`compact` read what they
    need and let it go. Make one with :func:`load`, or :func:`open_model` where no text
    is to be read.

    Attributes:
        path: the checkpoint folder.
        name: the hub id it was opened by, else the folder's name.
        config: its config.json.
        ifp: its ifp_config.json, or the defaults.
        source: where the weights are read from.
        plan: which parts of it are sliced.
        layers: ``L``.
        channels: ``F``, the width of the dense FFN; of experts, how many there are.
        groups: every layer's quantisation group along ``F``, 1 where there is none.
        granularity: widths that are multiples of it are whole groups.
        fingerprint: float16 ``[D]``, the final norm's weights, which identify it.
        adapter: the digest of the adapter that is fused into it, or ``None``.
        notes: the folder for measurements of it: its own, or the adapter's.
    """

    def __init__(self, source: Folder, name: str) -> None:
        self.source, self.name = source, name
        self.path, self.config, self.plan = source.path, source.config, source.plan
        self.ifp = IFPConfig.load(self.path)
        fused = source.adapter
        self.adapter = None if fused is None else fused.digest
        self.notes = self.path if fused is None else fused.folder
        self.layers, self.channels = self.plan.shape
        self.groups = group_sizes(source.skeleton, self.plan)
        self.granularity = math.lcm(
            self.ifp.granularity, *self.groups, source.granularity
        )
        if self.channels % self.granularity:
            raise ValueError(
                f"{self.path / CONFIG_FILE} has granularity {self.ifp.granularity}, "
                f"which does not divide the {self.channels} {self.plan.unit}s; correct "
                "it."
            )
        self.fingerprint = _fingerprint(source.skeleton)
        self._sketch: list[mx.array] | None = None

    def dense(self) -> nn.Module:
        """Return the whole stock mlx-lm model; each weight is read when first used."""
        return self.source.dense()

    @cached_property
    def tokenizer(self) -> Any:
        """mlx-lm's ``TokenizerWrapper``; reading it can take seconds.

        Raises:
            ValueError: if it is missing, damaged, or code of the folder's own.
        """
        return open_tokenizer(self.path, self.config)

    @cached_property
    def footprint(self) -> Footprint:
        """The bytes of its parts."""
        return Footprint.of(self)

    @cached_property
    def predictor(self) -> SparsityPredictor | None:
        """The checkpoint's trained predictor, or ``None``."""
        folder = self.path / PREDICTOR_FOLDER
        if not folder.exists():
            return None
        predictor = SparsityPredictor.load(folder)
        made_for = (predictor.layers, predictor.channels)
        here = (self.layers, self.channels)
        if made_for != here:
            raise ValueError(
                f"The predictor in {folder} scores {made_for[0]} layers of "
                f"{made_for[1]} {self.plan.unit}s, but the model has {here[0]} of {here[1]}; "
                "put the predictor that was trained with this model there."
            )
        return predictor

    @cached_property
    def prior(self) -> mx.array | None:
        """The prior kept with the checkpoint, float32 ``[L, F]``, or ``None``."""
        return self._stored(PRIOR_FILE, "scores", self.layers, self.channels)

    @cached_property
    def card(self) -> Card | None:
        """What was measured of the model's quality, or ``None``."""
        return load_card(self)

    def keep_card(self, card: Card) -> None:
        """Use a card from now on, and keep it for later: with the model, or in the
        user's cache.
        """
        self.__dict__["card"] = card
        with suppress(OSError):  # nothing can be written on this machine
            save_card(self, card)

    @cached_property
    def sensitivity(self) -> mx.array | None:
        """What pruning each layer alone costs, nats, float32 ``[L, 6]`` for the shares
        ``widths.MEASURED_SHARES``; ``None`` before ``ifp_mlx.sensitivity`` was run.
        """
        shares = len(MEASURED_SHARES)
        return self._stored(SENSITIVITY_FILE, "kl", self.layers, shares)

    def sketch(self, progress: ProgressBar = iter) -> list[mx.array]:
        """Return the sketch of the calibration text (:mod:`ifp_mlx.slicing.sketch`),
        ``[r, F]`` float16 for each layer. It is kept with the prior, and computed now
        if it is missing.

        It is read anew each time it is used: the sketches of all layers are large.
        """
        if (made := self._sketch) is not None:  # where the folder cannot be written
            return list(made)
        path = self.notes / PRIOR_FILE
        found: dict[str, mx.array] = {}
        if self.prior is not None:
            found = cast(dict[str, mx.array], mx.load(str(path)))
        names = [f"sketch.{layer}" for layer in range(self.layers)]
        if not found.keys() >= {*names}:
            self.compute_prior(progress=progress)
            return self.sketch()
        return [found[name] for name in names]

    def _sketched(self, progress: ProgressBar) -> sweep.Sketch:
        """Return a function that reads the sketch of a layer; computed now if missing."""
        _ = self.sketch(progress)
        return lambda layer: self.sketch()[layer]

    def _stored(self, file: str, name: str, *shape: int) -> mx.array | None:
        path = self.notes / file
        if not path.exists():
            return None
        try:
            found = cast(dict[str, mx.array], mx.load(str(path))).get(name)
        except RuntimeError:  # not safetensors at all
            found = None
        if found is None or found.shape != shape:
            raise ValueError(
                f"{path} does not hold {name} for {shape[0]} layers of {shape[1]}; "
                "delete it, and have it computed again."
            )
        return found

    def select(
        self,
        instruction: Prompt | None = None,
        *,
        scores: mx.array | None = None,
        progress: ProgressBar = iter,
        **options: Any,
    ) -> Selection:
        """Choose the units that an instruction needs.

        Args:
            instruction: what selects; see :class:`Request`.
            scores: ``[L, F]``, the selector's scores if they are known already.
            progress: wraps the iterations over calibration texts and over layers.
            options: the fields of :class:`Request` (``keep``, ``target_size``,
                ``selector``, ``allocation``, ``granularity``, ``seed``, ...). Nothing
                is compensated here unless ``compensate`` is true.

        Returns:
            A selection that says how it was made.

        Raises:
            ValueError: on a keep, selector or allocation that cannot be had.
        """
        plain = {"instruction": instruction, "compensate": False}
        decision = decide(Request(**plain | options), self, progress=progress)
        return self.selected(decision, scores=scores, progress=progress)

    def selected(
        self,
        decision: Decision,
        *,
        scores: mx.array | None = None,
        progress: ProgressBar = iter,
    ) -> Selection:
        """Return the selection that was decided on; see :meth:`select`."""
        if decision.selection is not None:
            return decision.selection
        if decision.compares and scores is None:
            return self.prepare(decision, progress=progress).selection
        selector = decision.selector
        if selector == "all":  # nothing to choose
            scores = mx.zeros((self.layers, self.channels))
        elif scores is None:
            seed = decision.request.seed
            scores = self.scores(
                decision.tokens, selector, seed=seed, progress=progress
            )
        elif scores.shape != self.plan.shape:
            raise ValueError(
                f"The scores have the shape {scores.shape}, and this model's layers and "
                f"{self.plan.unit}s {self.plan.shape}; give scores of this model."
            )
        selection = select(
            scores,
            decision.sizes,
            granularity=decision.granularity,
            gates=self.ifp.gates if selector == "predictor" else "binary",
            temperature=self.ifp.temperature,
            groups=decision.groups,
        )
        selection = replace(
            selection,
            origin=self._origin(decision),
            fingerprint=self.fingerprint,
            unit=self.plan.unit,
            adapter=self.adapter,
        )
        if not decision.compensate:
            return selection
        return selection.compensated(decision.tokens, "the instruction")

    def _origin(self, decision: Decision) -> Origin:
        instruction, text = decision.request.instruction, None
        if instruction is not None and ids_of(instruction) is None:
            text = instruction_of(as_messages(instruction))[-1]["content"]
        return Origin(
            selector=decision.selector,
            allocation=decision.allocation,
            keep=decision.size / self.channels,
            instruction=text,
        )

    def prepare(self, decision: Decision, *, progress: ProgressBar = iter) -> Compact:
        """Select and load what was decided on.

        With the selectors activation and blend, one pass over the layers does both;
        about one dense layer is then in memory above the compact model. The other
        selectors need no dense model: they are :meth:`selected`, then :meth:`compact`.

        Args:
            decision: from :func:`ifp_mlx.model.decide.decide`.
            progress: wraps the iterations over calibration texts and over layers.

        Raises:
            ValueError: if answers are to be checked, and drafted tokens cannot be taken
                out of the model's KV cache again; or if the compact model agrees less
                with the dense one than was asked for.
        """
        start = time.perf_counter()
        made = self._prepared(decision, progress)
        check_agreement(made.selection, decision.least)
        spent = time.perf_counter() - start - made.load
        return made._replace(select=spent)

    def _prepared(self, decision: Decision, progress: ProgressBar) -> Compact:
        from mlx_lm.models.cache import make_prompt_cache

        if decision.checks:
            # Refuses a cache that cannot go back.
            _ = Rollback(make_prompt_cache(self.source.skeleton))
        if not decision.reads:
            selection = self.selected(decision, progress=progress)
            chosen = time.perf_counter()
            load = self.apart if decision.checks else self.compact
            made = Compact(selection, load(selection, progress=progress))
            made = self._beside_whole(decision, made)
            spent = time.perf_counter() - chosen
            return made._replace(load=spent)
        rows, tokens = [mx.array(0.0)] * self.layers, decision.tokens
        swept = sweep.compact_model(
            self.source,
            tokens,
            self._chooser(decision, rows, progress),
            compensate=decision.compensate,
            sketch=self._sketched(progress) if decision.compensate else None,
            apart=decision.checks,
            remember=RECENT if decision.request.reselect == "drift" else 0,
            places=places_of(tokens) if decision.compares else None,
            progress=progress,
        )
        selection = self.selected(decision, scores=mx.stack(rows))
        if self.plan.unit == "expert":
            mass = mass_share(mx.stack(swept.uses)[:, 0], selection)
            origin = replace(selection.origin, router_mass=mass)
            selection = replace(selection, origin=origin)
        if swept.noted is not None:
            about = swept.model, swept.noted, tokens, swept.kv
            selection = compared(selection, *about)
        return self._beside_whole(decision, Compact(selection, swept.model, swept.kv))

    def _beside_whole(self, decision: Decision, made: Compact) -> Compact:
        """Put the whole model beside a compact one, if that is to check it."""
        if not decision.checks:
            return made
        return made._replace(whole=Whole(self.source, made.model, decision.room))

    def _chooser(
        self, decision: Decision, rows: list[mx.array], progress: ProgressBar
    ) -> Choose:
        """Return a function that chooses a layer's units and keeps its scores in
        ``rows``.
        """
        blend = decision.selector == "blend"
        prior = self.known_prior(progress) if blend else None

        def choose(layer: int, scores: mx.array, known: Evidence | None) -> mx.array:
            row = scores[None]
            if prior is not None and known is not None:
                row = merit(known, decision.size / self.channels)[None]
            elif prior is not None:
                row = self._blended(row, prior[layer : layer + 1])
            rows[layer] = row[0]
            return decision.units_of(layer, row)

        return choose

    def compact(
        self,
        selection: Selection,
        *,
        beside: tuple[nn.Module, Selection] | None = None,
        progress: ProgressBar = iter,
    ) -> nn.Module:
        """Load the selected units as an ordinary mlx-lm model.

        Args:
            selection: made with this model. If it is compensated, the dense model
                reads its text, layer by layer (:mod:`ifp_mlx.slicing.compensation`),
                and a quantised ``down_proj`` is quantised again.
            beside: another compact model made from this one, and its selection. The
                new model shares its attention, embeddings and norms. Units that both
                keep are copied where possible, unless the other model has gates or one
                of the two is compensated.
            progress: wraps the iteration over layers.

        Returns:
            An instance of mlx-lm's own class, its weights in memory. ``selection``
            is folded in: gates are part of the weights.

        Raises:
            ValueError: if the selection is of another model; or if it is compensated
                and has gates, or the text that it was compensated by is lost.
        """
        self.check_fits(selection)
        selection.check_reproducible()
        if selection.compensates:
            model = self._compensated(selection, progress)
            if beside is not None:
                share_core(model, beside[0], self.plan)
            return model
        if beside is None:
            model, donors = self.source.open(), None
        else:
            model, donors = self.source.open_beside(beside[0]), self._donors(*beside)
        fills = self.source.fill_all(
            self.plan.modules(model), selection.indices, donors
        )
        fill_model(model, self.plan, fills, selection, progress=progress)
        mx.eval(model.parameters())
        return model

    def apart(self, selection: Selection, *, progress: ProgressBar = iter) -> nn.Module:
        """Load the selected channels with unchanged weights, so that the whole model
        can be computed with them.

        Args:
            selection: see :meth:`compact`.
            progress: wraps the iteration over layers.

        Returns:
            A compact model that applies gates and corrections to what comes into the
            inlet of each layer (:mod:`ifp_mlx.slicing.apart`), instead of having them
            folded into its weights.
        """
        self.check_fits(selection)
        selection.check_reproducible()
        if selection.compensates:
            return self._compensated(selection, progress, apart=True)
        model = self.source.open()
        fills = partial(self.source.fill_all, self.plan.modules(model))
        set_apart_all(model, self.plan, fills, selection, progress=progress)
        mx.eval(model.parameters())
        return model

    def _compensated(
        self, selection: Selection, progress: ProgressBar, *, apart: bool = False
    ) -> nn.Module:
        """Return the compact model of a compensated selection."""
        beside = selection.compensation and selection.compensation.sketch
        how: dict[str, Any] = {"apart": apart, "progress": progress}
        how["sketch"] = self._sketched(progress) if beside else None
        return sweep.compensated_model(self.source, selection, **how)

    def _donors(self, other: nn.Module, its: Selection) -> list[Donor] | None:
        """Return the layers to copy units from; none if they were changed since
        reading.
        """
        if its.gates is not None or its.compensates:
            return None
        pairs = zip(self.plan.modules(other), its.indices, strict=True)
        return [Donor(module, index) for module, index in pairs]

    def check_fits(self, selection: Selection) -> None:
        """Raise ``ValueError`` unless a selection was made for this model."""
        if selection.unit != self.plan.unit:
            raise ValueError(
                f"The mask {selection.mask_id} keeps {selection.unit}s, and this model's "
                f"{self.plan.unit}s are selected; use a mask made with this model."
            )
        selection.check_fits(self.layers, self.channels, self.fingerprint)
        self._check_adapter(selection)
        if selection.unit == "expert":
            check_selection(selection, self.plan, self.config)

    def _check_adapter(self, selection: Selection) -> None:
        """Raise ``ValueError`` unless a selection was made with this adapter."""
        if selection.adapter == self.adapter:
            return
        made = "without an adapter"
        if selection.adapter is not None:
            made = f"with the adapter {selection.adapter}"
        here = "has none"
        if self.adapter is not None:
            here = f"has the adapter {self.adapter} ({self.notes})"
        raise ValueError(
            f"The mask {selection.mask_id} was made {made}, and this model {here}; an "
            "adapter changes which units are needed: use the adapter it was made with, "
            "or make the mask again."
        )

    def cut_layers(self, selection: Selection) -> list[int]:
        """Return the layers in which a selection cuts quantisation groups, so that
        :meth:`compact` quantises their ``down_proj`` again, with some loss.
        """
        parts = zip(selection.indices, self.groups, strict=True)
        return [
            layer
            for layer, (index, group) in enumerate(parts)
            if cuts_groups(index, group, self.channels)
        ]

    def slicing(self, selection: Selection) -> str:
        """Return how :meth:`compact` slices ``down_proj``: ``not quantised``, ``whole
        groups`` (nothing is lost) or ``requantised``.
        """
        if max(self.groups) == 1:
            return "not quantised"
        again = selection.compensates or self.cut_layers(selection)
        return "requantised" if again else "whole groups"

    def instruction_tokens(
        self, instruction: Prompt, config: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids that select, for anything :meth:`select` takes.

        Args:
            instruction: what selects.
            config: options of the chat template.
        """
        if (tokens := ids_of(instruction)) is None:
            messages = instruction_of(as_messages(instruction))
            tokens = tokenize(self.tokenizer, messages, config=config)
        return self.readable(tokens)

    def readable(self, tokens: Sequence[int]) -> list[int]:
        """Return a prompt's token ids, checked: the model can read all of them.

        Raises:
            ValueError: if there are more than the model was made for, or one is unknown.
        """
        return known_tokens(tokens, self.vocabulary, context_of(self.config))

    def tokens_of(
        self, messages: Sequence[Message], config: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation; see
        :func:`ifp_mlx.selection.prompts.tokenize`.

        Raises:
            ValueError: also on a token that the model has no embedding for.
        """
        tokens = tokenize(self.tokenizer, messages, config=config)
        return known_tokens(tokens, self.vocabulary)

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return vocabulary_of(self.source.skeleton)

    def scores(
        self,
        tokens: Sequence[int],
        selector: str,
        *,
        seed: int = 0,
        dense: nn.Module | None = None,
        progress: ProgressBar = iter,
    ) -> mx.array:
        """Return the scores of one selector, float32 ``[L, F]``.

        Args:
            tokens: of the instruction.
            selector: any but ``auto``.
            seed: of the selector ``random``.
            dense: a dense model already in memory; else the layers of one are read
                and let go again, one by one, if needed.
            progress: wraps the iterations over calibration texts and over layers.
        """
        if selector == "predictor":
            return self._predict(tokens)
        if selector == "random":
            return random_scores(self.layers, self.channels, seed)
        prior = None if selector == "activation" else self.known_prior(progress)
        if prior is not None and selector == "prior":
            return prior
        local = self.use_scores([(tokens,)], dense=dense, progress=progress)
        return local if prior is None else self._blended(local, prior)

    def use_scores(
        self,
        examples: Sequence[Example],
        *,
        dense: nn.Module | None = None,
        progress: ProgressBar = iter,
    ) -> mx.array:
        """Return how strongly some texts use each unit, float32 ``[L, F]``.

        Args:
            examples: token ids of each text, in parts; as many parts for every text.
            dense: see :meth:`scores`.
            progress: wraps the iteration over layers, or batches of texts.
        """
        if dense is None:
            return sweep.scores(self.source, examples, progress=progress)
        return reading.scores(dense, self.plan, examples, progress=progress)

    def _blended(self, local: mx.array, prior: mx.array) -> mx.array:
        return blend_scores(local, prior, unit=self.plan.unit)

    def known_prior(self, progress: ProgressBar = iter) -> mx.array:
        """Return the prior, float32 ``[L, F]``, computed now if it is not there yet."""
        prior = self.prior
        return self.compute_prior(progress=progress) if prior is None else prior

    def compute_prior(self, *, progress: ProgressBar = iter) -> mx.array:
        """Compute the prior over the package's calibration text and keep it with the
        checkpoint (only in memory where the folder cannot be written). For channels
        their sketch is computed and kept too; see :meth:`sketch`.

        Returns:
            float32 ``[L, F]``.
        """
        progress = named(progress, CALIBRATION)
        chats = [self._calibration_tokens(chat) for chat in calibration_chats()]
        texts = [tokens[:MOST_TOKENS] for tokens in chats]
        sketch: list[mx.array] = []
        if self.plan.unit == "expert":
            examples = [(tokens,) for tokens in texts]
            scores = self.use_scores(examples, progress=progress)
        else:
            scores, rows = sweep.calibration(self.source, texts, progress=progress)
            sketch = [row.astype(mx.float16) for row in rows]
        arrays = {f"sketch.{layer}": rows for layer, rows in enumerate(sketch)}
        try:
            with new_file(self.notes / PRIOR_FILE) as scratch:
                mx.save_safetensors(str(scratch), {"scores": scores} | arrays)
        except OSError:
            self._sketch = sketch
        self.__dict__["prior"] = scores
        return scores

    def _calibration_tokens(self, chat: list[Message]) -> list[int]:
        try:
            return self.tokens_of(chat)
        except ValueError:  # some chat templates know no system message
            return self.tokens_of([m for m in chat if m["role"] != "system"])

    def _predict(self, tokens: Sequence[int]) -> mx.array:
        assert self.predictor is not None
        own = self.predictor.tokenizer
        if own is not None:  # the predictor's language model has other tokens
            text = self.tokenizer.decode(tokens)
            tokens = own.encode(text, add_special_tokens=False)
        return self.predictor(mx.array(list(tokens))[None])[0]


def load(
    model: str | os.PathLike[str] = SHIPPED,
    adapter_path: str | os.PathLike[str] | None = None,
) -> tuple[IFPModel, Any]:
    """Open a checkpoint: an IFP checkpoint, or any stock folder of a supported type.

    Only headers are read; weights stay on disk until a selection needs them.

    Args:
        model: a local folder or a Hugging Face Hub id; default: the small trained
            checkpoint inside the package.
        adapter_path: the folder of an adapter that ``mlx_lm.lora`` trained on this
            (dense) model. It is fused into the weights as they are read, as
            ``mlx_lm.fuse`` does; where they are quantised, they are quantised again.
            Selections have to be made on the adapted model: a mask made without the
            adapter, or with another, is refused.

    Returns:
        The model and mlx-lm's tokenizer.

    Raises:
        FileNotFoundError: if there is no such folder or hub id.
        ValueError: if its content is damaged or of an unsupported type.
    """
    opened = open_model(model, adapter_path)
    return opened, opened.tokenizer


def open_model(
    model: str | os.PathLike[str] = SHIPPED,
    adapter_path: str | os.PathLike[str] | None = None,
) -> IFPModel:
    """Open a checkpoint as :func:`load` does; its tokenizer is read when it is first
    used.
    """
    path = resolve(model)
    adapter = None if adapter_path is None else Adapter(path_of(adapter_path))
    source = source_of(path, adapter)
    _ = source.plan  # refuses a model of which nothing can be selected
    name = path.resolve().name if path_of(model).exists() else str(model)
    return IFPModel(source, name)


def _fingerprint(model: nn.Module) -> mx.array:
    """Return the final norm's weights, float16 ``[D]``; for a type without them
    (nanochat) the weights of its last other norm, or none.
    """
    weights = tree_flatten(model.parameters(), destination={})
    others = [
        name
        for name, weight in weights.items()
        if weight.ndim == 1 and name.endswith("weight") and not IN_LAYER.search(name)
    ]
    norm = final_norm(model)
    names = others[-1:] if norm is None else [f"{norm}.weight"]
    found = weights[names[0]] if names else mx.zeros(0)
    fingerprint = found.astype(mx.float16)
    mx.eval(fingerprint)  # now, or the file would be read much later
    return fingerprint
