import io
import json

import mlx.core as mx
import pytest
from conftest import families, run_command, write_folder, write_quantised
from damage import change_weights, overlapping, truncated, write_index

from ifp_mlx import Selection, generate, load, stream_generate
from ifp_mlx.generate import main
from ifp_mlx.selection.request import MIN_AGREEMENT
from ifp_mlx.slicing.stock import build


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("generate") / "tiny"))


def selected(model, instruction, **options):
    """Return the selection of a request, whose channels make up for others."""
    return model.select(instruction, compensate=True, **options)


def test_keeping_everything_gives_mlx_lms_own_text(opened):
    import mlx_lm

    model, tokenizer = opened
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    stock = mlx_lm.generate(model.dense(), tokenizer, prompt, max_tokens=12)
    assert generate(model, tokenizer, "Hello", keep=1.0, max_tokens=12) == stock


def test_each_step_carries_the_selection_and_the_times(opened):
    model, tokenizer = opened
    steps = list(stream_generate(model, tokenizer, "Hello", keep=0.5, max_tokens=5))
    last = steps[-1]
    assert last.generation_tokens == 5 and last.finish_reason == "length"
    assert last.selection.mask_id == selected(model, "Hello", keep=0.5).mask_id
    assert 0 <= last.selection.origin.agreement <= 1
    seconds = last.seconds
    assert min(seconds.select, seconds.prefill, seconds.decode) > 0 == seconds.load
    assert seconds.ttft == pytest.approx(
        seconds.select + seconds.load + seconds.prefill
    )
    assert last.prompt_tokens == len(model.instruction_tokens("Hello"))


def test_the_instruction_selects_and_the_prompt_does_not(opened):
    model, tokenizer = opened
    options = {"keep": 0.5, "max_tokens": 1}
    steps = stream_generate(model, tokenizer, "Hello", instruction="French.", **options)
    expected = selected(model, "French.", keep=0.5)
    assert next(steps).selection.mask_id == expected.mask_id
    with_system = stream_generate(
        model, tokenizer, "Hello", system_prompt="Hm", **options
    )
    chat = [{"role": "system", "content": "Hm"}, {"role": "user", "content": "Hello"}]
    expected = selected(model, chat, keep=0.5)
    assert next(with_system).selection.mask_id == expected.mask_id


def test_the_first_human_message_selects_for_a_whole_conversation(opened):
    model, tokenizer = opened
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is a fjord?"},
    ]
    step = next(stream_generate(model, tokenizer, chat, max_tokens=1))
    assert step.selection.mask_id == selected(model, "Hello").mask_id
    assert step.prompt_tokens > len(model.instruction_tokens("Hello"))


def test_token_ids_are_taken_as_they_are(opened):
    model, tokenizer = opened
    step = next(stream_generate(model, tokenizer, [5, 9, 7], max_tokens=1))
    assert step.prompt_tokens == 3
    assert step.selection.mask_id == selected(model, [5, 9, 7]).mask_id


def test_auto_is_the_default_and_keeps_what_its_card_promises(opened, capsys):
    given = ["--model", opened[0].path, "-p", "Hello", "-m", 2, "--json"]
    reports = []
    for options in ([], ["--keep", "auto"], ["--min-agreement", 1]):
        status, out, err = run_command(main, capsys, *given, *options)
        assert status == 0, err
        reports.append(json.loads(out.splitlines()[-1]))
    default, auto, strict = (report["selection"] for report in reports)
    assert default == auto
    assert auto["kept_channels"] >= 0.75 * auto["total_channels"]
    assert reports[0]["promise"] >= MIN_AGREEMENT and reports[2]["promise"] == 1
    assert strict["kept_channels"] >= auto["kept_channels"]
    status, _, err = run_command(
        main, capsys, *given, "--keep", 0.1, "--min-agreement", 1
    )
    assert status == 2 and "min_agreement=1.0 is asked for" in err


def test_a_given_selection_is_used(opened):
    model, tokenizer = opened
    mine = model.select("Something else.", keep=0.75)
    step = next(
        stream_generate(model, tokenizer, "Hello", selection=mine, max_tokens=1)
    )
    assert step.selection is mine


def test_the_package_exports_the_function_even_after_its_module_is_imported():
    import ifp_mlx.generate

    assert callable(ifp_mlx.generate) and ifp_mlx.generate is generate


def test_the_command_ends_with_one_line_of_json(opened, capsys, tmp_path):
    mask = tmp_path / "mask.safetensors"
    arguments = ["--model", opened[0].path, "--prompt", "Hello", "--keep", "0.5"]
    arguments += ["--max-tokens", "4", "--json"]
    status, out, err = run_command(main, capsys, *arguments, "--save-mask", mask)
    assert status == 0
    text, _, line = out.rstrip("\n").rpartition("\n")
    report = json.loads(line)
    assert report["text"] == text
    assert report["generation_tokens"] == 4 and report["prompt_tokens"] > 4
    selection = report["selection"]
    assert selection["kept_channels"] == 96 and selection["total_channels"] == 192
    assert selection["layers"] == [64, 16, 16]
    assert (selection["selector"], selection["allocation"]) == (
        "blend",
        "first-layer",
    )
    assert set(report["seconds"]) == {"select", "load", "prefill", "decode", "ttft"}
    assert report["peak_memory_bytes"] > 0 and report["generation_tps"] > 0
    assert (
        f"96 of 192 channels, chosen by blend (first-layer), mask {selection['mask_id']}"
        in err
    )

    saved = Selection.load(mask)
    assert saved.mask_id == selection["mask_id"]
    assert saved.origin.instruction == "Hello"
    arguments = ["--model", opened[0].path, "--prompt", "Hello", "--max-tokens", "4"]
    status, again, _ = run_command(
        main, capsys, *arguments, "--mask-file", mask, "--json"
    )
    kl = pytest.approx(selection["kl"], rel=1e-3)  # a file has fewer digits
    expected = selection | {"kl": kl}
    assert json.loads(again.splitlines()[-1])["selection"] == expected
    assert json.loads(again.splitlines()[-1])["text"] == report["text"]


def test_the_command_says_how_a_quantised_down_proj_was_sliced(tmp_path, capsys):
    source = write_quantised(tmp_path / "q")
    given = ["--model", source, "-p", "Hello", "-m", "2", "--keep", "0.5", "--json"]
    for granularity, word in ((64, "whole groups"), (1, "requantised")):
        status, out, err = run_command(
            main, capsys, *given, "--granularity", granularity, "--no-compensate"
        )
        assert status == 0
        assert json.loads(out.splitlines()[-1])["down_proj"] == word
        assert ("nothing is lost" in err) == (word == "whole groups")
        assert ("quantised again" in err) == (word == "requantised")


def test_sampling_follows_the_seed(opened, capsys):
    arguments = ["--model", opened[0].path, "-p", "Hello", "--temp", "1.5", "-m", "8"]
    texts = [
        run_command(main, capsys, *arguments, "--seed", seed)[1] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_can_come_from_standard_input(opened, capsys, monkeypatch):
    arguments = ["--model", opened[0].path, "-m", "4", "--keep", "0.5"]
    _, expected, _ = run_command(main, capsys, *arguments, "-p", "Hello")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello")))
    assert run_command(main, capsys, *arguments, "-p", "-")[1] == expected


MISTAKES = {
    "a missing folder": (["--model", "gone"], "gone is neither an existing folder nor"),
    "a hub id without network": (
        ["--model", "org/name"],
        "org/name is no folder, and does not come",
    ),
    "keep 0": (["--keep", "0"], "keep=0.0 is not a share of the units"),
    "keep 1.5": (["--keep", "1.5"], "keep=1.5 is not a share of the units"),
    "two budgets": (["--keep", "1", "--target-size", "8"], "not allowed with argument"),
    "an unknown selector": (["--selector", "best"], "selector='best' is unknown"),
    "an unknown allocation": (["--allocation", "x"], "allocation='x' is unknown"),
    "an empty prompt": (["--prompt", " "], "The prompt ' ' is empty; give some text."),
    "an empty instruction": (["--instruction", ""], "The prompt '' is empty"),
    "no mask file": (["--mask-file", "gone"], "There is no mask file gone."),
    "no tokens wanted": (["-m", "0"], "--max-tokens 0 must be at least 1."),
    "not a number": (
        ["--keep", "half"],
        "keep='half' is not a share of the units; choose a number above 0 and up to 1 "
        "(1 keeps them all), or auto.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2(mistake, opened, capsys):
    arguments, sentence = MISTAKES[mistake]
    given = ["--model", opened[0].path, "--prompt", "Hello", *arguments]
    status, out, err = run_command(main, capsys, *given)
    assert status == 2 and out == ""
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_mask_file_of_another_model_is_a_mistake(opened, capsys, tmp_path):
    other, _ = load(write_folder(tmp_path / "other", intermediate_size=32))
    other.select("Hi").save(tmp_path / "mask")
    given = ["--model", opened[0].path, "-p", "Hello", "--mask-file", tmp_path / "mask"]
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "is for a model with 3 layers of 32 channels" in err
    status, _, err = run_command(main, capsys, *given, "--keep", "0.5")
    assert status == 2 and "leave out keep" in err


def write_wrong_shape(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights | {name: weights[name][:60]})


DAMAGES = {
    "truncated": (
        lambda folder: damage_weights(folder, truncated),
        "model.safetensors is damaged",
    ),
    "overlapping": (
        lambda folder: damage_weights(folder, overlapping),
        "model.safetensors is damaged",
    ),
    "of another shape": (write_wrong_shape, "has shape (60, 32)"),
    "outside the folder": (
        lambda folder: write_index(folder, "../model.safetensors"),
        "names '../model.safetensors', which is no file of its own folder",
    ),
}


def damage_weights(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_a_mistake(damage, tiny_folder, capsys):
    act, sentence = DAMAGES[damage]
    act(tiny_folder)
    status, out, err = run_command(main, capsys, "--model", tiny_folder, "-p", "Hello")
    assert (status, out) == (2, "")
    assert sentence in err and err.count("\n") == 1


def test_a_config_without_an_ffn_is_a_mistake(capsys, tmp_path):
    from mlx.utils import tree_flatten

    config = families()["mamba2"]
    folder = write_folder(tmp_path / "mamba2")
    weights = dict(tree_flatten(build(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    status, _, err = run_command(main, capsys, "--model", folder, "-p", "Hello")
    assert status == 2 and "mamba2.Model (model type mamba2) cannot be sliced" in err


def test_a_dense_prefill_leaves_the_answer_alone_where_nothing_is_dropped(tiny_folder):
    model, tokenizer = load(tiny_folder)
    options = {"max_tokens": 6, "keep": 1.0}
    plain = list(stream_generate(model, tokenizer, "Hello there", **options))
    dense = list(
        stream_generate(model, tokenizer, "Hello there", prefill="dense", **options)
    )
    assert [r.token for r in dense] == [r.token for r in plain]
    assert dense[-1].prompt_tokens == plain[-1].prompt_tokens
    assert dense[-1].seconds.prefill > 0


def test_a_dense_prefill_is_the_dense_models_reading_of_all_but_the_last_token(
    tiny_folder,
):
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load(tiny_folder)
    tokens = list(range(40, 52))
    selection = model.select(tokens, keep=0.25)
    (found,) = stream_generate(
        model, tokenizer, tokens, selection=selection, prefill="dense", max_tokens=1
    )
    dense, compact = model.dense(), model.compact(selection)
    cache = make_prompt_cache(dense)
    dense(mx.array([tokens[:-1]]), cache=cache)
    expected = compact(mx.array([tokens[-1:]]), cache=cache)[0, -1].argmax()
    assert found.token == int(expected)


def test_a_dense_prefill_and_a_memory_limit_exclude_each_other(tiny_folder, capsys):
    status, _, err = run_command(
        main, capsys, "--model", tiny_folder, "--prompt", "Hi", "--prefill", "dense",
        "--memory-gb", 1,
    )  # fmt: skip
    assert status == 2 and "leave one of them out" in err


def test_an_answer_beyond_the_models_context_is_noted_and_a_prompt_refused(
    tmp_path, capsys
):
    folder = write_folder(tmp_path / "short", max_position_embeddings=40)
    given = ["--model", folder, "--keep", 0.5, "-m", 8, "--prompt"]
    for prompt, long in (("Hi", False), ("Hi" * 10, True)):
        status, _, err = run_command(main, capsys, *given, prompt)
        assert status == 0
        assert ("tokens, and the model was made for 40: expect a poor" in err) == long
    for more in ([], ["--instruction", "Hi"]):
        status, out, err = run_command(main, capsys, *given, "Hi" * 20, *more)
        assert (status, out) == (2, "")
        assert "and the model was made for at most 40; shorten it." in err
    status, _, err = run_command(main, capsys, *given, "Hi", "--instruction", "Hi" * 20)
    assert status == 2 and "at most 40" in err
