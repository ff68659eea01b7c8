"""Adapters: the adapted model is the one that mlx_lm.fuse would write."""

import json
import math
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run_command, write_adapter, write_family, write_folder
from mlx.utils import tree_flatten, tree_unflatten
from test_channel_store import same_weights, write_quantised

from ifp_mlx import Selection, load, stream_generate
from ifp_mlx.compact import main as compact
from ifp_mlx.engine import Engine, IncompatibleModel
from ifp_mlx.generate import main as generate
from ifp_mlx.model.compact_cache import CompactCache
from ifp_mlx.slicing.sliced import slice_model
from ifp_mlx.storage.adapter import Adapter
from ifp_mlx.storage.folder import source_of
from ifp_mlx.storage.writer import write_store
from ifp_mlx.tasks import main as tasks

KINDS = ("lora", "dora", "full")
HELLO = {"max_tokens": 8, "keep": 1.0}


def fused(folder, adapter):
    """Return the adapted model as mlx-lm makes it."""
    model, _ = mlx_lm.load(str(folder), adapter_path=str(adapter))
    parts = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(parts))
    return model


@pytest.fixture(scope="module", params=["plain", "quantised"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / request.param
    if request.param == "quantised":
        return write_quantised(path)
    return write_folder(path)


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    return write_store(folder, tmp_path_factory.mktemp("store") / folder.name)


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_is_what_mlx_lm_fuses(kind, folder, tmp_path):
    if (kind, folder.name) == ("full", "quantised"):
        pytest.skip("mlx-lm trains no quantised weights")
    adapter = write_adapter(tmp_path / kind, folder, kind)
    source = source_of(folder, Adapter(adapter))
    assert same_weights(source.dense(), fused(folder, adapter))
    assert not mx.array_equal(
        source.dense().layers[-1].mlp.gate_proj.weight,
        source_of(folder).dense().layers[-1].mlp.gate_proj.weight,
    )


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_slicing_the_adapted_model_is_adapting_what_is_sliced(
    keep, folder, store, lora
):
    model, _ = load(folder, lora)
    selection = model.select("Hello", keep=keep, granularity=max(model.groups))
    expected = fused(folder, lora)
    slice_model(expected, model.plan, selection)
    assert same_weights(model.compact(selection), expected)
    stored, _ = load(store, lora)
    assert same_weights(stored.compact(selection), expected)
    other = stored.select("Another", selector="random", keep=0.25)
    beside = stored.compact(other), other
    assert same_weights(stored.compact(selection, beside=beside), expected)


def test_keeping_everything_gives_mlx_lms_own_tokens(folder, store, lora):
    stock, tokenizer = mlx_lm.load(str(folder), adapter_path=str(lora))
    tokens = load(folder)[0].instruction_tokens("Hello")
    if folder.name == "quantised":  # which mlx_lm.fuse quantises again
        stock = fused(folder, lora)
    steps = mlx_lm.stream_generate(stock, tokenizer, tokens, max_tokens=8)
    expected = [step.token for step in steps]
    for path in (folder, store):
        found = [
            step.token for step in stream_generate(*load(path, lora), "Hello", **HELLO)
        ]
        assert found == expected
    plain = [step.token for step in stream_generate(*load(folder), "Hello", **HELLO)]
    assert plain != expected


@pytest.mark.parametrize("check", ["exact", "off"])
def test_an_adapted_model_is_checked_and_fits_memory_as_any(
    check, folder, store, lora, tmp_path
):
    how = {"keep": 0.5, "max_tokens": 6, "check": check}
    if check == "exact":
        expected = [
            s.token for s in stream_generate(*load(folder, lora), "Hello", **HELLO)
        ]
        expected = expected[:6]
    else:
        how |= {"memory_bytes": 1 << 30, "cache": CompactCache(tmp_path)}
        model, tokenizer = load(folder, lora)
        # A compact model that is kept on disk is there without the keys and values.
        plain = how | {"memory_bytes": None, "prefill": "compact"}
        expected = [
            s.token for s in stream_generate(model, tokenizer, "Hello", **plain)
        ]
    for path in (folder, store):
        model, tokenizer = load(path, lora)
        steps = [*stream_generate(model, tokenizer, "Hello", **how)]
        assert [step.token for step in steps] == expected
        assert steps[-1].selection.adapter == model.adapter


def test_an_adapter_that_changes_is_not_mixed_with_the_old_one(tiny_folder, tmp_path):
    lora = write_adapter(tmp_path / "lora", tiny_folder)
    model, tokenizer = load(tiny_folder, lora)
    write_adapter(lora, tiny_folder, seed=2)
    with pytest.raises(OSError, match="has changed since the model was opened"):
        list(stream_generate(model, tokenizer, "Hello", keep=0.5, max_tokens=1))


def test_each_adapter_has_its_own_identity(folder, lora, tmp_path):
    other = write_adapter(tmp_path / "other", folder, seed=2)
    models = [load(folder)[0], load(folder, lora)[0], load(folder, other)[0]]
    every = [m.select("Hello", keep=1.0) for m in models]
    assert len({s.mask_id for s in every}) == 1
    assert len({s.identity for s in every}) == 3
    assert len({m.card and m.card.fingerprint for m in models}) == 1  # none has one yet
    file = tmp_path / "mask.safetensors"
    every[1].save(file)
    again = Selection.load(file)
    assert again.identity == every[1].identity
    for model in (models[0], models[2]):
        with pytest.raises(ValueError, match="the adapter it was made with"):
            model.compact(again)
    with pytest.raises(ValueError, match="made without an adapter"):
        models[1].compact(every[0])


def test_what_is_measured_of_an_adapted_model_is_kept_with_the_adapter(tmp_path):
    folder = write_folder(tmp_path / "model")
    lora = write_adapter(tmp_path / "lora", folder)
    before = {file.name for file in folder.iterdir()}
    model, tokenizer = load(folder, lora)
    next(stream_generate(model, tokenizer, "Hello", keep="auto", max_tokens=1))
    model.known_prior()
    assert {file.name for file in folder.iterdir()} == before
    assert (lora / "prior.safetensors").is_file()
    assert model.card is not None and load(folder)[0].card is None
    assert load(folder, lora)[0].card == model.card
    plain, _ = load(folder)
    assert not mx.allclose(plain.known_prior(), model.known_prior())


def test_a_mixture_has_adapters_too(tmp_path):
    folder = write_family(tmp_path / "mixture", "qwen3_moe")
    lora = write_adapter(tmp_path / "lora", folder)
    model, _ = load(folder, lora)
    assert model.plan.unit == "expert"
    selection = model.select("Hello", keep=0.5)
    expected = fused(folder, lora)
    slice_model(expected, model.plan, selection)
    assert same_weights(model.compact(selection), expected)
    store = write_store(folder, tmp_path / "store")
    assert same_weights(load(store, lora)[0].compact(selection), expected)


def test_the_commands_and_the_engine_take_an_adapter(folder, lora, tmp_path, capsys):
    given = ["--model", folder, "--adapter-path", lora, "--keep", "0.5"]
    asked = ["--instruction", "Hello", "--json", "--allocation", "uniform"]
    status, out, err = run_command(
        generate, capsys, *given, *asked, "-p", "Hi", "-m", 4
    )
    assert status == 0, err
    report = json.loads(out.splitlines()[-1])
    made = tmp_path / "compact"
    status, out, err = run_command(compact, capsys, *given, *asked, "--mlx-path", made)
    assert status == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["mask_id"] == report["selection"]["mask_id"]
    card = (made / "README.md").read_text()
    assert load(folder, lora)[0].adapter in card
    model, tokenizer = mlx_lm.load(str(made))  # which needs no adapter any more
    assert mlx_lm.generate(model, tokenizer, "Hi", max_tokens=2)
    with Engine.open(folder, adapter_path=lora) as engine:
        *_, done = engine.stream(
            "Hi", instruction="Hello", keep=0.5, max_tokens=4, allocation="uniform"
        )
        assert done.identity == report["selection"]["identity"]
    with pytest.raises(IncompatibleModel, match="is unknown"):
        Engine.open(folder, adapter_path=changed(lora, tmp_path, fine_tune_type="x"))


@pytest.mark.parametrize("stored", [False, True])
def test_an_engine_has_both_forms_of_an_adapted_model(stored, folder, store, lora):
    ask = {"instruction": "Hello", "max_tokens": 6, "keep": 0.5}
    model, tokenizer = load(folder, lora)
    with Engine.open(store if stored else folder, adapter_path=lora) as engine:
        plain = engine.generate("Hi", **ask)
        exact = engine.generate("Hi", check="exact", **ask)
        another = engine.generate("Hi", **ask | {"instruction": "Another"})
        assert exact == engine.generate("Hi", **ask | {"keep": 1.0})
        assert plain == engine.generate("Hi", **ask)
    how = {"prefill": "compact", **ask}
    steps = stream_generate(model, tokenizer, "Hi", **how)
    assert plain == "".join(step.text for step in steps)
    how["instruction"] = "Another"
    steps = stream_generate(model, tokenizer, "Hi", **how)
    assert another == "".join(step.text for step in steps)


def changed(adapter, tmp_path, **changes):
    """Return a copy of an adapter with other words in its config."""
    copy = shutil.copytree(adapter, tmp_path / "changed", dirs_exist_ok=True)
    config = json.loads((copy / "adapter_config.json").read_text()) | changes
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


def without(name):
    return lambda folder, _: (folder / name).unlink()


def with_weights(change):
    def damage(folder, _):
        file = str(folder / "adapters.safetensors")
        weights = mx.load(file)
        mx.eval(weights)
        mx.save_safetensors(file, change(weights))

    return damage


def with_code(folder, _):
    (folder / "model.py").write_text("raise SystemExit(7)")


def truncated(folder, _):
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:50])


BAD = {
    "no config": (without("adapter_config.json"), "is missing"),
    "no weights": (without("adapters.safetensors"), "is missing"),
    "no folder": (
        lambda folder, _: shutil.rmtree(folder),
        "There is no adapter folder",
    ),
    "code": (with_code, "never run"),
    "truncated": (truncated, "is damaged"),
    "another shape": (
        with_weights(
            lambda w: {n: a if "lora_a" not in n else a[:-1] for n, a in w.items()}
        ),
        "does not fit",
    ),
    "a part missing": (
        with_weights(lambda w: dict(list(w.items())[1:])),
        "does not fit",
    ),
    "an unknown tensor": (
        with_weights(lambda w: w | {"model.lora_a": mx.zeros(3)}),
        "not an adapter parameter",
    ),
    "empty": (with_weights(lambda w: {}), "holds nothing"),
    "whole numbers": (
        with_weights(lambda w: {n: a.astype(mx.int32) for n, a in w.items()}),
        "an adapter's numbers are floats",
    ),
}
WORDS = {
    "unknown type": ({"fine_tune_type": "ia3"}, "fine_tune_type='ia3'"),
    "no rank": ({"lora_parameters": {"scale": 1}}, "rank, scale and dropout"),
    "no numbers": ({"lora_parameters": None}, "rank, scale and dropout"),
    "asks for code": ({"trust_remote_code": True}, "never run"),
    "no scale": (
        {"lora_parameters": {"rank": 4, "scale": math.nan, "dropout": 0.0}},
        "rank, scale and dropout",
    ),
    "too many ranks": (
        {"lora_parameters": {"rank": 9, "scale": 1.0, "dropout": 0.0}},
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *WORDS])
def test_a_bad_adapter_is_one_sentence(name, tiny_folder, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "lora", tiny_folder)
    if name in BAD:
        damage, words = BAD[name]
        damage(adapter, tmp_path)
    else:
        changes, words = WORDS[name]
        adapter = changed(adapter, tmp_path, **changes)
    given = ["--model", tiny_folder, "--adapter-path", adapter, "-p", "Hi"]
    status, out, err = run_command(generate, capsys, *given)
    assert (status, out) == (2, "") and words in err, err
    assert "fetch or convert" not in err  # the model is all right
    words = err.replace(str(tmp_path), "")  # of whatever length
    assert err.count("\n") == 1 and len(words) < 500


def test_dora_of_the_inlet_is_refused_for_a_store_alone(tiny_folder, tmp_path):
    store = write_store(tiny_folder, tmp_path / "store")
    rows = ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"]
    dora = write_adapter(tmp_path / "dora", tiny_folder, "dora", keys=rows)
    selection = load(tiny_folder, dora)[0].select("Hello", keep=0.5)
    expected = fused(tiny_folder, dora)
    model, _ = load(store, dora)
    slice_model(expected, model.plan, selection)
    assert same_weights(model.compact(selection), expected)
    whole = write_adapter(tmp_path / "whole", tiny_folder, "dora")
    load(tiny_folder, whole)
    with pytest.raises(ValueError, match="mlx_lm.fuse writes"):
        load(store, whole)


def test_a_full_adapter_of_a_store_is_read_row_by_row(tiny_folder, tmp_path):
    store = write_store(tiny_folder, tmp_path / "store")
    full = write_adapter(tmp_path / "full", tiny_folder, "full")
    model, _ = load(store, full)
    selection = model.select("Hello", keep=0.5)
    expected = fused(tiny_folder, full)
    slice_model(expected, model.plan, selection)
    assert same_weights(model.compact(selection), expected)


def test_units_of_a_plain_folder_still_come_from_disk_where_nothing_is_adapted(
    tiny_folder, tmp_path
):
    lora = write_adapter(tmp_path / "lora", tiny_folder, layers=1)
    model, _ = load(tiny_folder, lora)
    names = {name for name, _ in tree_flatten(model.source.skeleton.parameters())}
    filed = model.source._as_filed.keys()
    left_out = {n for n in names - filed if ".mlp." in n}
    assert left_out and all("layers.2." in name for name in left_out)


def test_a_task_mask_is_made_with_the_adapter(tiny_folder, tmp_path, capsys):
    lora = write_adapter(tmp_path / "lora", tiny_folder)
    given = ["make", "--model", tiny_folder, "--adapter-path", lora, "--name", "hi"]
    given += ["--instruction", "Hello", "--tasks-folder", tmp_path / "tasks"]
    status, _, err = run_command(tasks, capsys, *given)
    assert status == 0, err
    mask = Selection.load(tmp_path / "tasks/hi.safetensors")
    assert mask.adapter == load(tiny_folder, lora)[0].adapter
