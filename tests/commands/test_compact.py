import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import (
    FAMILIES,
    relative_error,
    run_command,
    write_folder,
    write_quantised,
)

import ifp_mlx.model.export
from ifp_mlx import Selection, load
from ifp_mlx.compact import main
from ifp_mlx.model.calibration import calibration_texts
from ifp_mlx.model.export import MASK_FILE, Quantisation, write_compact
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of

TOKENS = mx.array([[5, 9, 77, 200, 13]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_folder_in_stock_mlx_lm_gives_the_compact_models_logits(
    family, tmp_path
):
    import mlx_lm

    model, _ = load(write_folder(tmp_path / "dense", family))
    selection = model.select("Hi", keep=0.5, allocation="uniform")
    out = write_compact(model, selection, tmp_path / "compact")
    stock, tokenizer = mlx_lm.load(str(out))
    assert mx.array_equal(stock(TOKENS), model.compact(selection)(TOKENS))
    assert stock.args.intermediate_size == 32
    assert mlx_lm.generate(stock, tokenizer, "Hello", max_tokens=3)
    assert Selection.load(out / MASK_FILE).mask_id == selection.mask_id
    # Some loaders take every safetensors file for weights, in subfolders too.
    weights = [file.name for file in out.rglob("*.safetensors")]
    assert weights == ["model.safetensors"]


def test_unequal_widths_become_nemotron_nas_for_a_llama(tmp_path):
    import mlx_lm

    folder = write_folder(tmp_path / "dense", intermediate_size=1024)
    model, _ = load(folder)
    selection = model.select("Hi", keep=0.5, allocation="first-layer")
    assert selection.sizes == [1024, 256, 256]
    ragged = model.select("Hi", keep=0.55, allocation="first-layer")
    assert ragged.sizes[1] == 332  # padded to 512
    for number, chosen in enumerate((selection, ragged)):
        out = write_compact(model, chosen, tmp_path / f"{number}")
        stock, _ = mlx_lm.load(str(out))
        assert type(stock).__module__ == "mlx_lm.models.nemotron-nas"
        error = relative_error(stock(TOKENS), model.compact(chosen)(TOKENS))
        assert error <= 1e-5
    widths = [block.mlp.gate_proj.weight.shape[0] for block in stock.layers]
    assert widths == [1024, 512, 512]


def test_a_config_of_nulls_becomes_nemotron_nas_too(tmp_path):
    import mlx_lm

    shape = {"intermediate_size": 1024, "num_key_value_heads": 4}
    folder = write_folder(tmp_path / "dense", **shape)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_key_value_heads": None, "head_dim": None, "text_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    selection = model.select("Hi", keep=0.5, allocation="first-layer")
    stock, _ = mlx_lm.load(str(write_compact(model, selection, tmp_path / "out")))
    error = relative_error(stock(TOKENS), model.compact(selection)(TOKENS))
    assert error <= 1e-5


def test_padded_biases_change_nothing(tmp_path):
    import mlx_lm

    model, _ = load(
        write_folder(tmp_path / "dense", intermediate_size=512, mlp_bias=True)
    )
    selection = model.select("Hi", keep=0.5, allocation="first-layer")
    stock, _ = mlx_lm.load(str(write_compact(model, selection, tmp_path / "out")))
    assert relative_error(stock(TOKENS), model.compact(selection)(TOKENS)) <= 1e-5


def test_unequal_widths_elsewhere_become_uniform_and_the_command_says_so(
    tmp_path, capsys
):
    folder = write_folder(tmp_path / "dense", "qwen3")
    arguments = ["--model", folder, "--instruction", "Hi", "--keep", "0.5"]
    arguments += [
        "--allocation",
        "first-layer",
        "--mlx-path",
        tmp_path / "out",
        "--json",
    ]
    status, out, err = run_command(main, capsys, *arguments)
    assert status == 0 and json.loads(out)["layers"] == [32, 32, 32]
    assert "No stock architecture for qwen3" in err and "writing uniform ones" in err
    load(folder)[0].select("Hi", keep=0.5).save(tmp_path / "ragged")
    arguments = ["--model", folder, "--mask-file", tmp_path / "ragged"]
    status, _, err = run_command(
        main, capsys, *arguments, "--mlx-path", tmp_path / "out2"
    )
    assert status == 2 and "no stock architecture for qwen3 can say" in err


def test_a_quantised_compact_folder_loads_and_is_close(tmp_path):
    import mlx_lm

    shape = {"intermediate_size": 256, "hidden_size": 64, "head_dim": 16}
    model, _ = load(write_folder(tmp_path / "dense", **shape))
    selection = model.select("Hi", keep=0.5, allocation="uniform")
    how = Quantisation(bits=8, group_size=32)
    out = write_compact(model, selection, tmp_path / "q", quantisation=how)
    stock, _ = mlx_lm.load(str(out))
    assert stock.layers[0].mlp.down_proj.bits == 8
    assert relative_error(stock(TOKENS), model.compact(selection)(TOKENS)) < 0.05
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}


def test_the_command_prints_the_folder_and_nothing_else(tmp_path, capsys):
    shape = {"intermediate_size": 128, "hidden_size": 64, "head_dim": 16}
    folder = write_folder(tmp_path / "dense", **shape)
    given = ["--model", folder, "--instruction", "Hi", "--mlx-path", tmp_path / "out"]
    status, out, _ = run_command(main, capsys, *given, "-q")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n")


def test_a_size_that_is_found_is_whole_quantisation_groups(tmp_path, capsys):
    shape = {"intermediate_size": 320, "hidden_size": 64, "head_dim": 16}
    folder = write_folder(tmp_path / "dense", **shape)
    given = ["--model", folder, "--instruction", "Hi", "-q", "--json"]
    status, out, err = run_command(main, capsys, *given, "--mlx-path", tmp_path / "one")
    assert status == 0, err
    # Three quarters would be 240, nine tenths 288.
    assert json.loads(out)["layers"][0] in (256, 320)
    # All of it is asked for, which is no whole groups.
    given += ["--mlx-path", tmp_path / "two", "--q-group-size", 48]
    status, _, err = run_command(main, capsys, *given, "--min-agreement", 1)
    assert status == 2 and "is not a multiple of the group of 48 channels" in err


def test_a_quantised_source_stays_quantised(tmp_path):
    import mlx_lm

    shape = {"intermediate_size": 256, "hidden_size": 64, "head_dim": 16}
    model, _ = load(write_folder(tmp_path / "dense", **shape))
    everything = model.select("Hi", keep=1.0)
    how = Quantisation(bits=4, group_size=64)
    source = write_compact(model, everything, tmp_path / "q", quantisation=how)
    quantised, _ = load(source)
    selection = quantised.select("Hi", keep=0.5, allocation="uniform")
    assert selection.sizes == [128] * 3
    out = write_compact(quantised, selection, tmp_path / "out")
    stock, _ = mlx_lm.load(str(out))
    assert mx.array_equal(stock(TOKENS), quantised.compact(selection)(TOKENS))
    with pytest.raises(ValueError, match="q is quantised already; leave out -q"):
        write_compact(quantised, selection, tmp_path / "out2", quantisation=how)


@pytest.mark.parametrize(
    ("how", "step"),
    [
        ({}, 64),
        ({"mixed": True}, 128),
        ({"mode": "mxfp4", "group": 32}, 32),
        ({"mode": "nvfp4", "group": 16}, 16),
        ({"mode": "mxfp8", "group": 32, "bits": 8}, 32),
    ],
)
def test_a_quantised_folder_is_sliced_exactly_and_stock_mlx_lm_loads_it(
    how, step, tmp_path, capsys
):
    import mlx_lm

    source = write_quantised(tmp_path / "q", **how)
    given = ["--model", source, "--instruction", "Hi", "--target-size", step * 2]
    given += ["--granularity", step, "--no-compensate", "--json"]
    status, out, err = run_command(main, capsys, *given, "--mlx-path", tmp_path / "out")
    report = json.loads(out)
    assert status == 0 and report["layers"] == [step * 2] * 3
    assert report["down_proj"] == "whole groups" and not report["requantisation_kl"]
    assert "whole quantisation groups, nothing is lost" in err
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    selection = Selection.load(tmp_path / "out" / MASK_FILE)
    masked = load(source)[0].dense()
    set_masks(mask_model(masked, plan_of(masked)), selection.mask())
    assert relative_error(stock(TOKENS), masked(TOKENS)) <= 1e-5
    assert "| Down_proj | whole groups |" in (tmp_path / "out/README.md").read_text()


def test_a_finer_choice_requantises_and_the_card_says_what_that_costs(tmp_path, capsys):
    import mlx_lm

    source = write_quantised(tmp_path / "q")
    given = ["--model", source, "--instruction", "Hi", "--keep", "0.5", "--json"]
    out = tmp_path / "out"
    given += ["--no-compensate", "--mlx-path", out]
    status, line, err = run_command(main, capsys, *given)
    report = json.loads(line)
    assert status == 0 and report["layers"] == [256] * 3
    assert report["down_proj"] == "requantised"
    cost = report["requantisation_kl"]
    assert 0 < cost and f"that costs a KL of {cost:.4g} nats per token" in err
    card = (out / "README.md").read_text()
    assert f"| Requantisation KL | {cost:.4g} nats per token |" in card
    assert "| Requantised layers | 3 |" in card

    model, _ = load(source)
    selection = Selection.load(out / MASK_FILE)
    compact = model.compact(selection)
    stock, _ = mlx_lm.load(str(out))
    assert mx.array_equal(stock(TOKENS), compact(TOKENS))
    # The same figure from the definition: all of it anew, the masked model as p.
    masked = model.dense()
    set_masks(mask_model(masked, plan_of(masked)), selection.mask())
    nats, count = 0.0, 0
    for tokens in calibration_texts(model):
        p, q = (
            nn.log_softmax(m(mx.array([tokens]))[0], axis=-1) for m in (masked, compact)
        )
        nats += float((mx.exp(p) * (p - q)).sum())
        count += len(tokens)
    assert cost == pytest.approx(nats / count, rel=0.01)


def test_the_width_of_a_finer_choice_is_still_whole_groups(tmp_path, capsys):
    source = write_quantised(tmp_path / "q")
    given = ["--model", source, "--instruction", "Hi", "--mlx-path", tmp_path / "out"]
    mistakes = {
        "target_size=100 is not a multiple of the group of 64 channels; use 64 or 128.": [
            "--granularity", "1", "--target-size", "100",
        ],
        "granularity=7 does not divide the 512 channels of a layer; use 1, or 64": [
            "--granularity", "7",
        ],
    }  # fmt: skip
    for sentence, arguments in mistakes.items():
        status, _, err = run_command(main, capsys, *given, *arguments)
        assert status == 2 and sentence in err and err.count("\n") == 1
    model, _ = load(source)
    mask = Selection((mx.arange(100),) * 3, None, 512)
    mask.save(tmp_path / "mask")
    given = ["--model", source, "--mask-file", tmp_path / "mask"]
    status, _, err = run_command(main, capsys, *given, "--mlx-path", tmp_path / "out")
    assert status == 2 and "target_size=100 is not a multiple" in err
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_it_is_and_where_it_comes_from(tmp_path):
    folder = write_folder(tmp_path / "Tiny-Llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("the licence")
    model, _ = load(folder)
    selection = model.select(
        "Translate | into\nFrench.", keep=0.5, allocation="uniform"
    )
    out = write_compact(model, selection, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0\n" in card
    assert "base_model: Tiny-Llama\n" in card
    assert f"| Mask | `{selection.mask_id}`, in {MASK_FILE} |" in card
    assert "| Channels | 96 of 192 FFN channels |" in card
    assert "| Instruction | Translate \\| into French. |" in card
    assert "The quality of this folder was not measured." in card
    assert str(tmp_path) not in card
    assert (out / "LICENSE").read_text() == "the licence"


@pytest.mark.parametrize("card", [None, "---\nlicense: [mit, apache-2.0]\n---\n"])
def test_a_card_without_a_known_licence_says_so(card, tmp_path):
    folder = write_folder(tmp_path / "tiny")
    if card is not None:
        (folder / "README.md").write_text(card)
    model, _ = load(folder)
    selection = model.select("Hi", allocation="uniform")
    card = (write_compact(model, selection, tmp_path / "out") / "README.md").read_text()
    assert "| Licence of the base | not named by the card of the source" in card
    assert "license:" not in card


def test_mistakes_are_one_line_and_exit_status_2(tmp_path, capsys):
    folder = write_folder(tmp_path / "dense", intermediate_size=256, hidden_size=64)
    given = ["--model", folder, "--mlx-path", tmp_path / "out"]
    (tmp_path / "there").mkdir()
    mistakes = {
        "out is said": [*given],
        "Give --instruction or --mask-file": [*given],
        "there already exists": ["--model", folder, "--mlx-path", tmp_path / "there"],
        "target_size=100 is not a multiple of the group of 64 channels; use 64 or 128.": [
            *given, "--instruction", "Hi", "--target-size", "100", "-q",
        ],
        "target_size=154 is not a multiple of the group of 64 channels; use 128 or 192.": [
            *given, "--instruction", "Hi", "--keep", "0.6", "-q",
        ],
    }  # fmt: skip
    del mistakes["out is said"]
    for sentence, arguments in mistakes.items():
        status, out, err = run_command(main, capsys, *arguments)
        assert status == 2 and out == "" and sentence in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "there"]


def test_a_broken_run_leaves_nothing_behind(tmp_path, monkeypatch):
    model, _ = load(write_folder(tmp_path / "dense"))
    selection = model.select("Hi", allocation="uniform")
    monkeypatch.setattr(ifp_mlx.model.export, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_compact(model, selection, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    (tmp_path / "out").mkdir()
    with pytest.raises(
        FileExistsError, match="out already exists; delete it or choose"
    ):
        write_compact(model, selection, tmp_path / "out")


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_compact_folder_gives_the_same_logits_in_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "dense", family)
    model, _ = load(folder)
    selection = model.select("Hi", keep=0.5, allocation="uniform")
    out = write_compact(model, selection, tmp_path / "out")
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = other(torch.tensor(TOKENS.tolist())).logits
    found = mx.array(logits.numpy())
    assert relative_error(found, model.compact(selection)(TOKENS)) <= 5e-4
