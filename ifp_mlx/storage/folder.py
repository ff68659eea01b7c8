"""Where full weights live: find a model folder, check it, open it without reading."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.config import older_keys, read_config
from ..files.literal import literal
from ..files.objects import read_object
from ..files.paths import path_of
from ..files.quantised import quantised_by, unreadable
from ..files.tensors import digest_of, weights_of
from ..slicing.plan import plan_of
from ..slicing.reading import order_of
from ..slicing.shapes import Plan
from ..slicing.sliced import Donor, forget_units, share_core, twin
from ..slicing.stock import unmoved_random_state
from .layout import AGAIN, CHANNEL_FILE, DTYPES, read_layout
from .units import Wanted

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .adapter import Adapter
    from .device import Device
    from .reader import ChannelReader
    from .units import UnitReader

# The small trained checkpoint inside the package.
SHIPPED = Path(__file__).parent.parent / "checkpoint"

# Files that a model needs, and those that say how it may be used. Never code.
NEEDED = ["*.json", "model*.safetensors", "predictor/*.safetensors", "*.jinja"]


NEEDED += ["tokenizer.model", "*.tiktoken", "*.txt"]


DOCUMENTS = ["LICENSE*", "README.md"]


def resolve(model: str | os.PathLike[str], tqdm_class: type | None = None) -> Path:
    """Return the folder of ``model``, fetching it from the hub if need be.

    Args:
        model: an existing folder, or a Hugging Face id such as ``org/name``.
        tqdm_class: shows the download, instead of the hub client's own bars.

    Raises:
        FileNotFoundError: if it is neither, or if the hub does not give it.
        NotADirectoryError: if it is a file.
    """
    path = path_of(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"{path} has no config.json, so it is not a model folder; "
                "give a folder with config.json, model*.safetensors and a tokenizer."
            )
        return path
    if path.exists():
        raise NotADirectoryError(
            f"{path} is a file, not a model folder; give its folder, or convert it "
            "with ifp_mlx convert if it is a GGUF file or a state dict."
        )
    if isinstance(model, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return _fetch(model, tqdm_class)
    raise FileNotFoundError(
        f"{model} is neither an existing folder nor a hub id such as org/name; "
        "check the spelling."
    )


def _fetch(repo: str, tqdm_class: type | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    reasons = {
        errors.GatedRepoError: "it is gated; accept its terms on huggingface.co, "
        "then run `hf auth login`",
        errors.RepositoryNotFoundError: "it is not there, or private; check the id, "
        "or run `hf auth login`",
        errors.LocalEntryNotFoundError: "it is not in the cache and the hub cannot be "
        "reached; connect to the network with HF_HUB_OFFLINE unset, or give a folder",
    }
    bars: dict[str, Any] = {"tqdm_class": tqdm_class} if tqdm_class else {}
    try:
        try:
            patterns = NEEDED + DOCUMENTS
            return Path(snapshot_download(repo, allow_patterns=patterns, **bars))
        except errors.IncompleteSnapshotError:
            # Offline, with a copy fetched by mlx-lm, which leaves documents out.
            return Path(
                snapshot_download(repo, allow_patterns=NEEDED, local_files_only=True)
            )
    except Exception as error:  # the client passes its HTTP library's errors on
        kinds = (why for kind, why in reasons.items() if isinstance(error, kind))
        why = next(kinds, f"{type(error).__name__}: {error}; try again")
        raise FileNotFoundError(
            f"{repo} is no folder, and does not come from the Hugging Face Hub: {why}."
        ) from error


class Folder:
    """An ordinary model folder as the source of a model's weights, checked once.

    Every source can open a stock model whose weights are not in memory yet, and put
    units into one layer of it. The model's class is built once; every :meth:`open`
    copies its structure.

    Args:
        path: the folder.
        adapter: fused into all that is read, as it is read.

    Attributes:
        path: the folder.
        adapter: as given, or ``None``.
        config: its config.json.
        skeleton: the stock mlx-lm model, dense in shape, for its structure only: no
            weight of it is ever read.
        granularity: units that lie, and are best selected, together.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the files contradict themselves, each other, or what mlx-lm's
            class for this config expects: config, index, safetensors headers, and the
            name and shape of every tensor are compared.
    """

    granularity = 1

    def __init__(self, path: Path, adapter: "Adapter | None" = None) -> None:
        self.path, self.adapter = path, adapter
        self.config = read_config(path / "config.json")
        if (index := path / "model.safetensors.index.json").exists():
            index_files(index)
        self._files = _check_headers(path)
        self._check_depth()
        self._absent = self._absent_tensors()
        # A tensor's name in the model: its name in the file.
        self._as_filed: dict[str, str] = {}
        self._built: nn.Module | None = None
        self.skeleton = self._checked()

    @cached_property
    def plan(self) -> Plan:
        """What is sliced of the model; see :func:`ifp_mlx.slicing.plan.plan_of`."""
        return plan_of(self.skeleton, self.config)

    @cached_property
    def order(self) -> list[int]:
        """Its layers as a forward pass goes through them; see
        :func:`ifp_mlx.slicing.reading.order_of`.
        """
        return order_of(self.skeleton, self.plan)

    @cached_property
    def reader(self) -> "UnitReader":
        """The reader of units from the files; it counts what it has read."""
        return self.reader_of(self.plan)

    def reader_of(self, plan: Plan, device: "Device | None" = None) -> "UnitReader":
        """Return another reader.

        Args:
            plan: of this model, or a part of it.
            device: assumed cost of reading; default: what is measured.
        """
        from .plain import PlainReader

        found = weights_of(self.path)
        tensors = {name: found[filed] for name, filed in self._as_filed.items()}
        return PlainReader(plan, self.skeleton, tensors, device)

    @property
    def reads_units(self) -> bool:
        """Whether only chosen units are read; in a plain folder a channel's column does
        not lie in one piece, so more is read.
        """
        return self.plan.unit == "expert" and self.adapter is None

    def open(self) -> "nn.Module":
        """Return the stock mlx-lm model, dense in shape; no weight is in memory yet."""
        return self._adapted(self._load(None))

    def open_beside(self, other: "nn.Module") -> "nn.Module":
        """Return what :meth:`open` does, but sharing everything except the units with
        another compact model of this source, made by :meth:`open` and :meth:`fill`.
        """
        model = self.open()
        share_core(model, other, self.plan)
        return model

    def fill(
        self, module: "nn.Module", layer: int, index: "mx.array | None" = None
    ) -> None:
        """Put a layer's units into its module, in place.

        Args:
            module: the layer's, in a model from :meth:`open`.
            layer: its number.
            index: int32 ``[k]``, sorted; ``None`` is all units, which are then read
                when first used.

        Raises:
            ValueError: if ``k`` channels do not make whole quantisation groups.
            OSError: if a file cannot be read, or has changed.
        """
        if index is not None:
            self.reader.fill(module, layer, index)

    def fill_all(
        self,
        modules: Sequence["nn.Module"],
        indices: "Sequence[mx.array | None] | None" = None,
        donors: "Sequence[Donor] | None" = None,
    ) -> Iterator[int]:
        """Fill layer after layer as :meth:`fill` does, and yield the number of each.

        Args:
            modules: of all layers of a model from :meth:`open`.
            indices: for each layer, as for :meth:`fill`; default: all units.
            donors: for each layer, that of another compact model without gates folded
                in; its units are copied where they are rows.
        """
        if not indices:
            yield from range(len(modules))
            return
        some = [n for n, index in enumerate(indices) if index is not None]
        wanted = [
            Wanted(modules[n], n, indices[n], donors[n] if donors else None)
            for n in some
        ]
        filled = self.reader.fill_each(wanted)
        for n, index in enumerate(indices):
            yield n if index is None else next(filled)

    def dense(self) -> "nn.Module":
        """Return the whole stock mlx-lm model; its weights stay on disk till used
        (those of a channel store are read now).
        """
        return self.open()

    def _absent_tensors(self) -> dict[str, "mx.array"]:
        """Return stand-ins for tensors that are not in the safetensors files."""
        return {}

    def _check_depth(self) -> None:
        """Refuse more layers than there are tensors before any of them is built."""
        layers = self.config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(self._files):
            raise ValueError(
                f"num_hidden_layers={layers} in {self.path / 'config.json'} is more than "
                f"the {len(self._files)} tensors beside it; config.json and the weights do "
                "not belong together: fetch or convert both again."
            )

    def _checked(self) -> "nn.Module":
        problems: list[str | None] = []
        foreign = unreadable(self.config) if quantised_by(self.config) else ""

        def compare(model: "nn.Module", weights: dict[str, Any]) -> None:
            """Compare instead of loading: here names and shapes are final."""
            problems.append(_mismatch(model, weights, self._files, self.path))

        _classes(self.config, self.path)  # its refusal has a sentence of its own
        try:
            model = self._load(compare)
        except Exception as error:  # whatever mlx-lm's model code raises
            advice = foreign or "fetch or convert it again."
            raise ValueError(
                f"mlx-lm cannot build a {self.config['model_type']} model from "
                f"{self.path} ({type(error).__name__}: {error}); {advice}"
            ) from error
        if problems[0]:
            advice = foreign or (
                "config.json and the weights do not belong together: fetch or convert "
                "both again."
            )
            raise ValueError(f"{problems[0]}; {advice}")
        return self._adapted(model)

    def _load(
        self, compare: Callable[["nn.Module", dict[str, Any]], None] | None
    ) -> "nn.Module":
        """Return mlx-lm's model of the folder; no weight is read.

        Args:
            compare: is shown the weights before they are loaded, in :meth:`_checked`.
        """
        from mlx_lm.utils import load_model

        model_class, args_class = _classes(self.config, self.path)
        filed: dict[str, mx.array] = {}

        def build(args: Any) -> "nn.Module":
            if self._built is None:
                with unmoved_random_state():
                    self._built = model_class(args)
            model = twin(self._built)
            model.sanitize = partial(sanitised, getattr(model, "sanitize", dict))
            if compare is not None:
                model.load_weights = partial(loaded, model)
            return model

        def sanitised(own: Callable, weights: dict[str, "mx.array"]) -> dict:
            filed.update(weights)
            found = weights | self._absent
            try:
                return own(dict(found))
            except KeyError:  # it expects the names used before transformers 4.52
                return own({_older_name(n): weight for n, weight in found.items()})

        def loaded(model: "nn.Module", weights: list, strict: bool = True) -> None:
            assert compare is not None
            names = {id(weight): name for name, weight in filed.items()}
            self._as_filed = {n: names[id(w)] for n, w in weights if id(w) in names}
            compare(model, dict(weights))
            # compare's caller reports what does not fit.
            model_class.load_weights(model, weights, strict=False)

        how: dict[str, Any] = {
            "model_config": older_keys(self.config, self.path / "config.json"),
            "get_model_classes": lambda config: (build, args_class),
        }
        with literal(self.path) as path:
            model, self.config = load_model(path, lazy=True, **how)
        for name in ("sanitize", "load_weights"):
            vars(model).pop(name, None)
        return model

    def _adapted(self, model: "nn.Module") -> "nn.Module":
        """Fuse the adapter, if there is one, into a model, in place; return the model."""
        if self.adapter is not None:
            changed = self.adapter.fuse(model, self.path)
            self._as_filed = {
                n: filed for n, filed in self._as_filed.items() if n not in changed
            }
        return model


class ChannelStore(Folder):
    """A folder whose units are in a channel file; :meth:`fill` reads those asked for at
    once, and :meth:`open` has zeros in their place.
    """

    def __init__(self, path: Path, adapter: "Adapter | None" = None) -> None:
        super().__init__(path, adapter)
        if digest_of(weights_of(path)) != self.reader.layout.core:
            raise ValueError(
                f"{path / CHANNEL_FILE} was made for another model than the weights "
                f"beside it; {AGAIN}."
            )
        self.granularity = self.reader.layout.unit
        if adapter is not None:
            modules = self.plan.modules(self.skeleton)
            for layer, module in zip(self.plan.layers, modules, strict=True):
                adapter.check_unit_by_unit(layer, module)

    @cached_property
    def reader(self) -> "ChannelReader":
        """The channel file, and how much of it has been read."""
        return self.reader_of(self.plan)

    def reader_of(self, plan: Plan, device: "Device | None" = None) -> "ChannelReader":
        """See :meth:`Folder.reader_of`; whole records are read."""
        from .reader import ChannelReader

        return ChannelReader(self.path / CHANNEL_FILE, plan, device, self.adapter)

    @property
    def reads_units(self) -> bool:
        """See :attr:`Folder.reads_units`."""
        return True

    def open_beside(self, other: "nn.Module") -> "nn.Module":
        """See :meth:`Folder.open_beside`; ``other`` is copied, since opening the model
        again takes longer than reading the units that change.
        """
        model = twin(other)
        forget_units(model, self.plan)
        return model

    def fill(
        self, module: "nn.Module", layer: int, index: "mx.array | None" = None
    ) -> None:
        """Read a layer's units into its module; see :meth:`ChannelReader.fill`."""
        self.reader.fill(module, layer, index)

    def fill_all(
        self,
        modules: Sequence["nn.Module"],
        indices: "Sequence[mx.array | None] | None" = None,
        donors: "Sequence[Donor] | None" = None,
    ) -> Iterator[int]:
        """See :meth:`Folder.fill_all`; while a layer is put in place, the next is read."""
        return self.reader.fill_all(modules, indices, donors)

    def dense(self) -> "nn.Module":
        """See :meth:`Folder.dense`."""
        model = self.open()
        for _ in self.fill_all(self.plan.modules(model)):
            pass
        return model

    def _absent_tensors(self) -> dict[str, "mx.array"]:
        """Return zeros for the tensors of the channel file, which take no memory until
        they are used.
        """
        import mlx.core as mx

        file = self.path / CHANNEL_FILE
        parts = [part for layer in read_layout(file).parts for part in layer]
        for part in parts:
            if part.name in self._files:
                raise ValueError(
                    f"{part.name} is in both {self._files[part.name]} and {file}; "
                    "delete the file that does not belong to this model."
                )
            self._files[part.name] = file
        return {
            p.name: mx.zeros(p.shape, getattr(mx, DTYPES[p.dtype][0])) for p in parts
        }


def source_of(path: Path, adapter: "Adapter | None" = None) -> Folder:
    """Return a model folder as a source of weights, checked.

    Args:
        path: the folder.
        adapter: fused into the weights as they are read.

    Raises:
        FileNotFoundError, ValueError: as :class:`Folder`; or if it is a channel store
            that is damaged, or not of the model beside it.
    """
    kind = ChannelStore if (path / CHANNEL_FILE).exists() else Folder
    return kind(path, adapter)


def _classes(config: dict[str, Any], path: Path) -> tuple[Any, Any]:
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"model_type={config['model_type']!r} in {path / 'config.json'} is not "
            "supported by mlx-lm; use a model that mlx-lm can load."
        ) from error


def _mismatch(
    model: "nn.Module", found: dict[str, Any], files: dict[str, Path], path: Path
) -> str | None:
    """Say how the tensors found first differ from those that ``model`` expects."""
    from mlx.utils import tree_flatten

    expected = tree_flatten(model.parameters(), destination={})
    for name, tensor in expected.items():
        if name not in found:
            return f"{path} lacks the tensor {name} {tensor.shape}"
        if found[name].shape != tensor.shape:
            return (
                f"{name} in {files.get(name, path)} has shape {found[name].shape}, "
                f"but config.json asks for {tensor.shape}"
            )
        if _is_float(tensor) and not _is_float(found[name]):
            held = weights_of(path).get(name)
            return (
                f"{name} in {files.get(name, path)} holds "
                f"{held.dtype if held else found[name].dtype} without scales that mlx-lm "
                "knows, so that it would take them for whole numbers"
            )
    for name in sorted(found.keys() - expected.keys()):
        return (
            f"{files.get(name, path)} holds {name}, which config.json has no place for"
        )
    return None


def _older_name(name: str) -> str:
    """Return the name that a tensor of a language model inside another model had before
    transformers 4.52, which is also mlx-lm's.
    """
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return f"language_model.{name}"  # the output layer


def _is_float(array: "mx.array") -> bool:
    import mlx.core as mx

    return mx.issubdtype(array.dtype, mx.floating)


def index_files(index: Path) -> list[Path]:
    """Return the files that a ``*.index.json`` names, all of them in its folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; delete it or fetch it again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"{index} names {name!r}, which is no file of its own folder; "
                "fetch the model again."
            )
        if not index.with_name(name).exists():
            raise FileNotFoundError(
                f"{index} names {name}, which is missing; fetch it."
            )
    return [index.with_name(name) for name in names]


def _check_headers(path: Path) -> dict[str, Path]:
    """Return the file that holds each tensor."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    for file in sorted(path.glob("model*.safetensors")):
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is a link to {file.readlink()}, which is not there; put that "
                "back, or fetch the model again."
            )
        try:
            with safe_open(file, framework="numpy") as header:
                names = header.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); fetch or convert the model again."
            ) from error
        if twice := files.keys() & set(names):
            raise ValueError(
                f"{min(twice)} is in both {files[min(twice)]} and {file}; "
                "delete the file that does not belong to this model."
            )
        files |= dict.fromkeys(names, file)
    if not files:
        raise FileNotFoundError(
            f"{path} has no model*.safetensors; "
            "convert its weights with ifp_mlx convert first."
        )
    return files
