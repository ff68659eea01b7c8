"""The model to be trained: opened, given a predictor, adapted, and written."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..files.atomic import new_folder
from ..files.companions import copy_companions
from ..files.config import read_config
from ..files.paths import path_of
from ..model.checkpoint import PREDICTOR_FOLDER, IFPConfig
from ..selection.predictor import HEAD, SparsityPredictor
from ..selection.tokenizer import open_tokenizer
from ..slicing.masked import mask_model
from ..slicing.plan import plan_of
from ..slicing.shapes import Plan, is_quantised
from ..slicing.stock import build
from ..storage.folder import resolve, source_of
from .mixtures import check_mixture, freeze_routers
from .recipe import TrainConfig
from .step import Parent


@dataclass
class Trainee:
    """A model to be trained, and where it came from.

    Attributes:
        path: its folder.
        config: its config.json.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        model: mlx-lm's own class, its weights in memory.
        plan: which of its units are masked.
        own: its ifp_config.json, if it is a checkpoint with a predictor.
    """

    path: Path
    config: dict[str, Any]
    tokenizer: Any
    model: nn.Module
    plan: Plan
    own: IFPConfig | None = None


def open_trainee(config: TrainConfig) -> Trainee:
    """Load the model to be trained, or make a random one of its shape.

    Raises:
        FileNotFoundError, ValueError: as :func:`ifp_mlx.load`, or if the settings do
            not suit a mixture.
    """
    path = resolve(config.model)
    if config.from_scratch:
        about = read_config(path / "config.json")
        about.pop("quantization", None)
        model = build(about)
    else:
        source = source_of(path)
        about, model = source.config, source.dense()
    plan = plan_of(model, about)  # refuses a model that cannot be masked
    trained = (path / PREDICTOR_FOLDER).exists() and not config.from_scratch
    own = IFPConfig.load(path) if trained else None
    check_mixture(plan, about, config.of(plan.unit, own))
    if config.dtype != "stored":
        model.set_dtype(getattr(mx, config.dtype))
    mx.eval(model.parameters())
    tokenizer = open_tokenizer(path, about)
    return Trainee(path, about, tokenizer, model, plan, own)


def dense_parent(trainee: Trainee, config: TrainConfig) -> Parent | None:
    """Return the model that gives the KL, if the KL has a weight: the teacher, or the
    model as it is stored.

    Raises:
        ValueError: if there is no such model, or it has other tokens.
    """
    parent = teacher_of(trainee, config)
    return None if parent is None else lambda batch: parent(batch.tokens[:, :-1])


def teacher_of(trainee: Trainee, config: TrainConfig) -> nn.Module | None:
    """Return the model of :func:`dense_parent`."""
    if config.kl_weight == 0:
        return None
    if config.teacher is None and config.from_scratch:
        raise ValueError("kl_weight needs a teacher, or a model not from_scratch.")
    if config.teacher is None:
        return source_of(trainee.path).dense()
    path = resolve(config.teacher)
    source = source_of(path)
    words = open_tokenizer(path, source.config).get_vocab()
    if words != trainee.tokenizer.get_vocab():
        raise ValueError(
            f"The teacher {config.teacher} has other tokens than {trainee.path}; use one "
            "of the same family."
        )
    return source.dense()


def make_predictor(trainee: Trainee, config: TrainConfig) -> SparsityPredictor:
    """Return a predictor for the model: one that was trained, or a new one, whose head
    is random.

    Raises:
        ValueError: if its settings do not fit.
    """
    folder = trained_predictor(trainee, config)
    predictor = (
        _new_predictor(trainee, config) if folder is None else _trained(trainee, folder)
    )
    predictor.set_dtype(mx.float32)
    backbone = predictor.backbone
    if "lm_head" in backbone:
        backbone.lm_head.freeze()  # never used; weight decay would shrink it
    if config.predictor != "new":
        for module in backbone.modules():
            if isinstance(module, nn.Embedding):
                module.freeze()
    mx.eval(predictor.parameters())
    return predictor


def trained_predictor(trainee: Trainee, config: TrainConfig) -> Path | None:
    """Return the folder of the predictor to continue, ``None`` for a new one."""
    if config.predictor == "auto":
        return None if trainee.own is None else trainee.path / PREDICTOR_FOLDER
    folder = path_of(config.predictor)
    return folder if (folder / HEAD).is_file() else None


def _trained(trainee: Trainee, folder: Path) -> SparsityPredictor:
    predictor = SparsityPredictor.load(folder)
    made_for = (predictor.layers, predictor.channels)
    if made_for != trainee.plan.shape:
        raise ValueError(
            f"The predictor in {folder} scores {made_for[0]} layers of {made_for[1]} "
            f"{trainee.plan.unit}s, but the model has {trainee.plan.shape[0]} of "
            f"{trainee.plan.shape[1]}; give one that was trained with this model."
        )
    return predictor


def _new_predictor(trainee: Trainee, config: TrainConfig) -> SparsityPredictor:
    size = trainee.plan.shape
    options: dict[str, Any] = {"pooling": config.pooling}
    if config.predictor not in ("auto", "first-layers", "new"):
        backbone, about, tokenizer = _pretrained_backbone(trainee, config.predictor)
        options["tokenizer"] = tokenizer
    else:
        copied = config.predictor != "new"
        about = (
            _first_layers(trainee.config, config.predictor_layers)
            if copied
            else _new_config(trainee, config)
        )
        backbone = build(about)
        if copied:
            _copy_weights(trainee.model, backbone)
    return SparsityPredictor(
        backbone, *size, config.predictor_rank, config=about, **options
    )


def adapt(model: nn.Module, plan: Plan, config: TrainConfig) -> None:
    """Freeze what is not trained, add LoRA or DoRA layers, and mask, in place.

    Masks come last: what an adapter adds to a layer's output is masked too.

    Raises:
        ValueError: if a quantised model is to be trained in full.
    """
    _free(model, plan, config)
    if config.freeze_router:
        freeze_routers(model, plan)
    mask_model(model, plan)


def _free(model: nn.Module, plan: Plan, config: TrainConfig) -> None:
    if config.train == "full":
        if any(map(is_quantised, model.modules())):
            raise ValueError(
                "The model is quantised, and quantised weights cannot be trained; use "
                "--train lora, or a model that is not quantised."
            )
        return
    model.freeze()
    if config.train == "frozen":
        return
    if config.train == "ffn":
        norms = (m for n, m in model.named_modules() if "norm" in n.rpartition(".")[2])
        for module in [*norms, *plan.modules(model)]:
            module.unfreeze()
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = len(model.layers) if config.lora_layers < 0 else config.lora_layers
    settings = {"rank": config.lora_rank, "scale": config.lora_scale, "dropout": 0.0}
    linear_to_lora_layers(model, layers, settings, use_dora=config.train == "dora")


def write_checkpoint(
    folder: Path,
    trainee: Trainee,
    ifp: IFPConfig | None,
    predictor: SparsityPredictor | None,
    card: str | None = None,
) -> None:
    """Write the trained model as a folder that :func:`ifp_mlx.load` opens.

    Args:
        folder: must not be there.
        trainee: LoRA layers in its model are fused, in place.
        ifp: how its selections are made; ``None`` for a dense model.
        predictor: makes its selections.
        card: its README.
    """
    from mlx_lm.utils import save_config, save_model

    model = trainee.model
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    if fused:
        model.update_modules(tree_unflatten(fused))
        mask_model(model, trainee.plan)  # a fused layer has a new inlet
    with new_folder(folder) as scratch:
        save_model(scratch, model)
        save_config(copy.deepcopy(trainee.config), scratch / "config.json")
        copy_companions(trainee.path, scratch)
        if ifp is not None:
            ifp.save(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        if predictor is not None:
            predictor.write(scratch / PREDICTOR_FOLDER)


def _pretrained_backbone(
    trainee: Trainee, name: str
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Return a stock language model, its config, and its tokenizer if it has another
    vocabulary than the trainee.
    """
    path = resolve(name)
    source = source_of(path)
    about, backbone = source.config, source.dense()
    tokenizer = open_tokenizer(path, about)
    same = tokenizer.get_vocab() == trainee.tokenizer.get_vocab()
    return backbone, about, None if same else tokenizer


def _first_layers(about: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the config of a model's first layers."""
    if "num_hidden_layers" not in about:
        raise ValueError(
            "The first layers of this model cannot be copied as its predictor (its "
            "config.json has no num_hidden_layers of its own); use --predictor new, or "
            "the folder of a language model."
        )
    if not 0 < layers <= (most := about["num_hidden_layers"]):
        raise ValueError(
            f"predictor_layers={layers} must be between 1 and the {most} of the model."
        )
    return _of_layers(about, layers)


def _of_layers(about: dict[str, Any], layers: int) -> dict[str, Any]:
    small = copy.deepcopy(about) | {"num_hidden_layers": layers}
    small.pop("quantization", None)
    small.pop("quantization_config", None)
    if isinstance(types := small.get("layer_types"), Sequence):
        small["layer_types"] = [types[i % len(types)] for i in range(layers)]
    return small


def _new_config(trainee: Trainee, config: TrainConfig) -> dict[str, Any]:
    """Return the config of a small model of the same kind; for a mixture, or if the
    config.json is not of a single language model, that of a plain llama, which has no
    experts.
    """
    width, heads = config.predictor_width, 4
    if width % (2 * heads):
        raise ValueError(f"predictor_width={width} must be a multiple of 8.")
    about = trainee.config
    if trainee.plan.unit == "expert" or "num_hidden_layers" not in about:
        words = 1 + max(trainee.tokenizer.get_vocab().values())
        about = {"model_type": "llama", "vocab_size": words, "rms_norm_eps": 1e-6}
    small = _of_layers(about, config.predictor_layers)
    small |= {"hidden_size": width, "intermediate_size": 2 * width}
    small |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    small |= {"head_dim": width // heads}
    return small | {"tie_word_embeddings": True}


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    weights = dict(tree_flatten(source.parameters()))
    names = [name for name, _ in tree_flatten(target.parameters())]
    if any(name not in weights for name in names) or any(
        map(is_quantised, source.modules())
    ):
        raise ValueError(
            "The first layers of this model cannot be copied as its predictor (it is "
            "quantised); use --predictor new, or the folder of a language model."
        )
    target.load_weights([(name, weights[name]) for name in names])
