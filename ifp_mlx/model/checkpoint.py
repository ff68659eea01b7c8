"""A checkpoint folder as an object: select channels, make the compact model."""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..files.atomic import new_file
from ..selection import calibration, masks, top_k, widths
from ..selection.config import CONFIG_FILE, IFPConfig
from ..selection.masks import Selection
from ..selection.predictor import SparsityPredictor
from ..selection.prompts import (
    Message,
    Prompt,
    as_messages,
    instruction_of,
    is_tokens,
    tokenize,
)
from ..selection.scores import blend_scores, random_scores
from ..selection.widths import Allocation
from ..slicing import reading
from ..slicing.pruning import (
    Donor,
    cuts_groups,
    dense_shape,
    ffn_layers,
    fill_model,
    group_sizes,
    share_core,
)
from ..storage.folder import SHIPPED, check_folder, dense_of, resolve, source_of
from . import sweep
from .decision import Choice, decide
from .sweep import Choose, Swept

PRIOR_FILE, PREDICTOR_FOLDER = "prior.safetensors", "predictor"


SENSITIVITY_FILE = "sensitivity.safetensors"


Progress = Callable[[Iterable], Iterable]


class IFPModel:
    """A large model on disk, from which an instruction's channels can be loaded.

    No weight stays in memory: :meth:`select` and :meth:`compact` read what they
    need and let it go. Make one with :func:`load`.

    Attributes:
        path: the checkpoint folder.
        name: the hub id it was opened by, else the folder's name.
        config: its config.json.
        ifp: its ifp_config.json, or the defaults.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        source: where the weights are read from.
        layers: ``L``.
        channels: ``F``, the width of the dense FFN.
        groups: every layer's quantisation group along ``F``, 1 where there is none.
        granularity: what widths are multiples of, so that they are whole groups.
    """

    def __init__(
        self, path: Path, name: str, config: dict[str, Any], tokenizer: Any
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self.ifp = IFPConfig.load(path)
        self.source = source_of(path)
        dense = self.source.open()
        self.layers, self.channels = dense_shape(dense)
        self.groups = group_sizes(dense)
        self.granularity = math.lcm(
            self.ifp.granularity, *self.groups, self.source.granularity
        )
        if self.channels % self.granularity:
            raise ValueError(
                f"{path / CONFIG_FILE} has granularity {self.ifp.granularity}, which "
                f"does not divide the {self.channels} channels; correct it."
            )
        self.fingerprint = _fingerprint(dense)

    def dense(self) -> nn.Module:
        """Return the whole stock mlx-lm model; each weight is read when first used."""
        return dense_of(self.source)

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
                f"{made_for[1]} channels, but the model has {here[0]} of {here[1]}; "
                "put the predictor that was trained with this model there."
            )
        return predictor

    @cached_property
    def prior(self) -> mx.array | None:
        """The prior kept with the checkpoint, float32 ``[L, F]``, or ``None``."""
        return self._stored(PRIOR_FILE, "scores", self.layers, self.channels)

    @cached_property
    def sensitivity(self) -> mx.array | None:
        """What pruning each layer alone costs, nats, float32 ``[L, 6]`` for the shares
        ``widths.MEASURED_SHARES``; ``None`` before ``ifp_mlx.sensitivity`` was run.
        """
        shares = len(widths.MEASURED_SHARES)
        return self._stored(SENSITIVITY_FILE, "kl", self.layers, shares)

    def _stored(self, file: str, name: str, *shape: int) -> mx.array | None:
        path = self.path / file
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
        instruction: Prompt,
        *,
        keep: float | None = None,
        target_size: int | None = None,
        selector: str = "auto",
        allocation: Allocation | None = None,
        granularity: int | None = None,
        seed: int = 0,
        scores: mx.array | None = None,
        progress: Progress = iter,
    ) -> Selection:
        """Choose the channels that an instruction needs.

        Args:
            instruction: a text, which goes through the chat template as in
                :func:`ifp_mlx.generate`; messages, of which those up to the first
                user message count; or token ids, taken as they are.
            keep: kept share of ``F``, rounded to the granularity. Default: the
                checkpoint's own target size, else 0.5.
            target_size: ``k`` itself, instead of ``keep``.
            selector: ``predictor``, ``activation``, ``prior``, ``blend``, ``random``,
                or ``auto``: the first of predictor, blend (if a prior is kept with
                the checkpoint) and activation that is there. ``prior`` and
                ``blend`` compute the prior once if it is missing.
            allocation: ``uniform``, ``first-layer`` or, once measured,
                ``sensitivity``. Default: uniform for a trained predictor, else
                first-layer where the budget pays for it.
            granularity: channels that are selected together. Default: as the
                checkpoint says, else 1, for which a quantised ``down_proj`` is
                quantised again; whole groups lose nothing and choose worse.
            seed: of the selector ``random``.
            scores: ``[L, F]``, the selector's own if they are known already.
            progress: wraps the iterations over calibration texts and over layers.

        Returns:
            A selection with its making in ``info``.

        Raises:
            ValueError: on a keep, selector or allocation that cannot be had.
        """
        choice = decide(self, keep, target_size, selector, allocation, granularity)
        tokens = self.instruction_tokens(instruction)
        selector = choice.selector
        if selector == "all":  # nothing to choose
            scores = mx.zeros((self.layers, self.channels))
        elif scores is None:
            scores = self.scores(tokens, selector, seed=seed, progress=progress)
        selection = top_k.select(
            scores,
            choice.sizes,
            granularity=choice.granularity,
            gates=self.ifp.gates if selector == "predictor" else "binary",
            temperature=self.ifp.temperature,
        )
        share = f"{choice.size / self.channels:.4g}"
        info = {"selector": selector, "allocation": choice.allocation, "keep": share}
        if not is_tokens(instruction):
            text = instruction_of(as_messages(instruction))[-1]["content"]
            info["instruction"] = text
        return replace(selection, info=info, fingerprint=self.fingerprint)

    def sweep(
        self,
        instruction: Prompt,
        *,
        keep: float | None = None,
        target_size: int | None = None,
        selector: str = "auto",
        allocation: Allocation | None = None,
        granularity: int | None = None,
        compensate: bool = False,
        seed: int = 0,
        progress: Progress = iter,
    ) -> Swept:
        """Select and make the compact model in one pass over the layers.

        With the selectors activation and blend every layer is read once, and about
        one dense layer is in memory above the compact model. The others need no
        dense model, and are :meth:`select`, then :meth:`compact`.

        Args:
            instruction, keep, target_size, selector, allocation, granularity, seed: see
                :meth:`select`.
            compensate: let kept channels make up for dropped ones, as the instruction
                shows; see :meth:`ifp_mlx.Selection.compensated`.
            progress: wraps the iterations over calibration texts and over layers.

        """
        choice = decide(self, keep, target_size, selector, allocation, granularity)
        options: dict[str, Any] = {
            "target_size": choice.size,
            "selector": selector,
            "allocation": allocation,
            "granularity": granularity,
            "seed": seed,
        }
        tokens = self.instruction_tokens(instruction)
        swept = None
        if choice.reads:
            rows = [mx.array(0.0)] * self.layers
            choose = self._chooser(choice, rows, progress)
            swept = sweep.compact_model(
                self.source, tokens, choose, compensate=compensate, progress=progress
            )
            options["scores"] = mx.stack(rows)
        selection = self.select(instruction, **options, progress=progress)
        if compensate:
            selection = selection.compensated(tokens, "the instruction")
        if swept is None:
            return Swept(selection, self.compact(selection, progress=progress))
        return Swept(selection, *swept)

    def _chooser(
        self, choice: Choice, rows: list[mx.array], progress: Progress
    ) -> Choose:
        """Return what chooses a layer's channels, and keeps its scores in ``rows``."""
        prior = self.known_prior(progress) if choice.selector == "blend" else None

        def choose(layer: int, scores: mx.array) -> mx.array:
            row = scores[None]
            if prior is not None:
                row = blend_scores(row, prior[layer : layer + 1])
            rows[layer] = row[0]
            return choice.channels_of(layer, row)

        return choose

    def compact(
        self,
        selection: Selection,
        *,
        beside: tuple[nn.Module, Selection] | None = None,
        progress: Progress = iter,
    ) -> nn.Module:
        """Load the selected channels as an ordinary mlx-lm model.

        Args:
            selection: made with this model. If it is compensated, the dense model
                reads its text, layer by layer (:mod:`ifp_mlx.compensation`), and a
                quantised ``down_proj`` is quantised again.
            beside: another compact model of this one, and its selection. Attention,
                embeddings and norms are used again instead of read; so are, from a
                channel store, channels that are neither compensated nor have gates.
            progress: wraps the iteration over layers.

        Returns:
            An instance of mlx-lm's own class, its weights in memory. ``selection``
            is folded in: gates are part of the weights.

        Raises:
            ValueError: if the selection is of another model, or is compensated and
                has gates.
        """
        selection.check_fits(self.layers, self.channels, self.fingerprint)
        if selection.compensates:
            model = sweep.compensated_model(self.source, selection, progress=progress)
            if beside is not None:
                share_core(model, beside[0])
            return model
        if beside is None:
            model, donors = self.source.open(), None
        else:
            model, donors = self.source.open_beside(beside[0]), _donors(*beside)
        ffns = [ffn.module for ffn in ffn_layers(model)]
        fills = self.source.fill_all(ffns, selection.indices, donors)
        fill_model(model, fills, selection, progress=progress)
        mx.eval(model.parameters())
        return model

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
        again = masks.COMPENSATED in selection.info or self.cut_layers(selection)
        return "requantised" if again else "whole groups"

    def instruction_tokens(self, instruction: Prompt) -> list[int]:
        """Return the token ids that select, for anything :meth:`select` takes."""
        if is_tokens(instruction):
            return list(instruction)
        return tokenize(self.tokenizer, instruction_of(as_messages(instruction)))

    def scores(
        self,
        tokens: list[int],
        selector: str,
        *,
        seed: int = 0,
        dense: nn.Module | None = None,
        progress: Progress = iter,
    ) -> mx.array:
        """Return the channel scores of one selector, float32 ``[L, F]``.

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
        if dense is None:
            local = sweep.activation_scores(self.source, tokens, progress=progress)
        else:
            local = reading.activation_scores(dense, tokens)
        return local if prior is None else blend_scores(local, prior)

    def known_prior(self, progress: Progress = iter) -> mx.array:
        """Return the prior, float32 ``[L, F]``, computed now if it is not there yet."""
        prior = self.prior
        return self.compute_prior(progress=progress) if prior is None else prior

    def compute_prior(self, *, progress: Progress = iter) -> mx.array:
        """Compute the prior over the package's calibration text and keep it with the
        checkpoint (in memory alone where the folder cannot be written).

        Returns:
            float32 ``[L, F]``.
        """
        texts = [self._calibration_tokens(c) for c in calibration.calibration_chats()]
        scores = reading.prior_scores(self.dense(), texts, progress=progress)
        try:
            with new_file(self.path / PRIOR_FILE) as scratch:
                mx.save_safetensors(str(scratch), {"scores": scores})
        except OSError:
            pass
        self.__dict__["prior"] = scores
        return scores

    def _calibration_tokens(self, chat: list[Message]) -> list[int]:
        try:
            return tokenize(self.tokenizer, chat)
        except ValueError:  # some chat templates know no system message
            return tokenize(self.tokenizer, [m for m in chat if m["role"] != "system"])

    def _predict(self, tokens: list[int]) -> mx.array:
        assert self.predictor is not None
        own = self.predictor.tokenizer
        if own is not None:  # the predictor's language model has other tokens
            text = self.tokenizer.decode(tokens)
            tokens = own.encode(text, add_special_tokens=False)
        return self.predictor(mx.array(tokens)[None])[0]


def load(model: str | os.PathLike[str] = SHIPPED) -> tuple[IFPModel, Any]:
    """Open a checkpoint: an IFP checkpoint, or any stock folder of a supported type.

    Only headers are read; weights stay on disk until a selection needs them.

    Args:
        model: a local folder or a Hugging Face Hub id; default: the small trained
            checkpoint inside the package.

    Returns:
        The model and mlx-lm's tokenizer.

    Raises:
        FileNotFoundError: if there is no such folder or hub id.
        ValueError: if its content is damaged or of an unsupported type.
    """
    from mlx_lm.utils import load_tokenizer

    path = resolve(model)
    config = check_folder(path)
    tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    name = path.resolve().name if Path(model).exists() else str(model)
    return IFPModel(path, name, config, tokenizer), tokenizer


def _donors(other: nn.Module, its: Selection) -> list[Donor] | None:
    """Return the FFNs to take channels from; none if they are not as they were read."""
    if its.gates is not None or its.compensates:
        return None
    layers = zip(ffn_layers(other), its.indices, strict=True)
    return [Donor(ffn.module, index) for ffn, index in layers]


def _fingerprint(model: nn.Module) -> mx.array:
    """Return the final norm's weights, float16 ``[D]``."""
    norms = {
        name: weight
        for name, weight in tree_flatten(model.parameters())
        if name.endswith("norm.weight") and not re.search(r"\.\d+\.", name)
    }
    if not norms:
        raise ValueError(f"{type(model).__module__} has no final norm to know it by.")
    name = next(
        (n for n in norms if re.search(r"(^|\.)norm\.weight$", n)), [*norms][-1]
    )
    fingerprint = norms[name].astype(mx.float16)
    mx.eval(fingerprint)  # or it would be read from the file much later
    return fingerprint
