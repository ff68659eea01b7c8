import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import run_command, write_folder

from ifp_mlx import Selection, compact, generate, load
from ifp_mlx.evaluation import tasks
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.evaluation.tasks import TaskMask
from ifp_mlx.evaluation.teacher import Evaluator
from ifp_mlx.generate import main as generate_main
from ifp_mlx.model import export
from ifp_mlx.model.checkpoint import IFPModel
from ifp_mlx.selection.calibration import SKETCH_VERSION
from ifp_mlx.selection.config import IFPConfig
from ifp_mlx.selection.masks import Origin, find_mask
from ifp_mlx.slicing.compensation import read_channels
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.tasks import main

ROWS = [
    {"prompt": f"Say {word} in French.", "completion": f"It is {word}!"}
    for word in ("water", "bread", "house", "street", "night", "bridge")
]
EXAMPLES = [Row([5, 9, 77, 200, 13], [8, 9]), Row([3], [4]), Row([250, 60, 61], [])]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("tasks") / "tiny"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "french.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_prompts_and_answers_have_the_same_say_however_long_they_are(opened):
    model, _ = opened
    task = tasks.make(model, "french", EXAMPLES, keep=0.5)
    prompts, answers = np.zeros((3, 64)), np.zeros((3, 64))
    for row in EXAMPLES:
        channels = read_channels(
            model.dense(), plan_of(model.dense()), row.prompt + row.answer
        )
        for layer, h in enumerate(channels):
            square = np.square(np.array(h, dtype=np.float64))
            energy = square / square.sum(axis=1, keepdims=True)
            prompts[layer] += energy[: len(row.prompt)].sum(axis=0)
            answers[layer] += energy[len(row.prompt) :].sum(axis=0)
    shares = [part / part.sum(axis=1, keepdims=True) for part in (prompts, answers)]
    np.testing.assert_allclose(task.scores, np.sqrt(sum(shares)), rtol=2e-3)
    best = np.argsort(-np.array(task.scores[1]), kind="stable")[:16]
    assert task.selection.sizes == [64, 16, 16]
    assert sorted(best) == task.selection.indices[1].tolist()


def test_a_task_file_says_how_it_was_made_and_gives_the_task_back(opened, tmp_path):
    model, _ = opened
    made = tasks.make(model, "french", EXAMPLES, keep=0.25, allocation="uniform")
    path = made.save(tmp_path)
    again = TaskMask.load(path)
    assert path == tmp_path / "french.safetensors" and again.name == "french"
    assert again.selection.mask_id == made.selection.mask_id
    assert again.selection.origin == replace(made.selection.origin)
    np.testing.assert_allclose(again.scores, made.scores, rtol=1e-3)
    origin = again.selection.origin
    assert origin.selector == "task" and origin.model == "tiny"
    assert (origin.keep, origin.allocation) == (0.25, "uniform")
    about = origin.made
    assert about["examples"] == 3 and about["tokens"] == 12
    assert set(about) == {"selector", "examples", "tokens", "date", "versions"}
    assert about["selector"] == "activation"
    assert mx.array_equal(again.selection.fingerprint, model.fingerprint)
    assert again.evaluation is None


def test_a_task_keeps_the_beginning_of_its_examples(opened, tmp_path, monkeypatch):
    model, _ = opened
    made = tasks.make(model, "french", EXAMPLES)
    text = (5, 9, 77, 200, 13, 8, 9, 3, 4, 250, 60, 61)
    assert made.selection.text == text
    assert Selection.load(made.save(tmp_path)).text == text
    other = tasks.make(model, "other", EXAMPLES[1:])
    monkeypatch.setattr(tasks, "TEXT_TOKENS", 6)
    assert tasks.make(model, "french", EXAMPLES).selection.text == text[:6]
    merged = tasks.merge(model, "both", [made, other]).selection
    assert merged.text == (5, 9, 77, 3, 4, 250)
    bare = TaskMask(
        replace(made.selection, text=None), made.scores
    )  # of an older version
    assert tasks.merge(model, "both", [bare, bare]).selection.text is None


def test_a_mask_without_scores_is_no_task(opened, tmp_path):
    path = tmp_path / "mask.safetensors"
    opened[0].select("Hello").save(path)
    with pytest.raises(ValueError, match="mask.safetensors is a mask, but not of a"):
        TaskMask.load(path)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name, opened):
    with pytest.raises(ValueError, match="cannot be a task's"):
        tasks.make(opened[0], name, EXAMPLES)


def test_examples_are_needed(opened):
    with pytest.raises(ValueError, match="french has no examples"):
        tasks.make(opened[0], "french", [])


def test_where_no_keep_is_asked_for_it_is_the_checkpoints_own_or_three_quarters(
    opened, tmp_path
):
    folder = write_folder(tmp_path / "own")
    IFPConfig(target_size=24).save(folder)
    for model, kept in ((opened[0], 48), (load(folder)[0], 24)):
        for size, expected in (({}, kept), ({"target_size": 16}, 16)):
            task = tasks.make(model, "t", EXAMPLES, allocation="uniform", **size)
            assert task.selection.sizes == [expected] * 3
            both = tasks.merge(model, "b", [task, task], allocation="uniform", **size)
            assert both.selection.sizes == [expected] * 3


def test_a_merged_mask_has_the_asked_size_and_each_task_the_same_say(opened):
    model, _ = opened
    one, two = np.zeros((3, 64), np.float32), np.zeros((3, 64), np.float32)
    one[:, :16], two[:, 48:] = 1.0, 1000.0  # the second saw many more tokens
    one[:, 20:28] = 0.1
    likes = [
        TaskMask(tasks.make(model, name, EXAMPLES).selection, mx.array(scores))
        for name, scores in (("one", one), ("two", two))
    ]
    merged = tasks.merge(model, "both", likes, keep=0.5, allocation="uniform")
    assert merged.selection.sizes == [32] * 3
    expected = [*range(16), *range(48, 64)]
    assert all(index.tolist() == expected for index in merged.selection.indices)
    assert merged.selection.origin.made["merged"] == ["one", "two"]
    with pytest.raises(ValueError, match=r"merges 1 task\(s\)"):
        tasks.merge(model, "alone", likes[:1])


def test_a_task_of_another_model_is_not_merged(opened, tmp_path):
    model, _ = opened
    other, _ = load(write_folder(tmp_path / "other", seed=7))
    pair = [tasks.make(m, m.name, EXAMPLES) for m in (model, other)]
    with pytest.raises(ValueError, match="was made for another model"):
        tasks.merge(model, "both", pair)


def test_overlap_stands_beside_chance():
    half, other = mx.arange(32), mx.arange(16, 48)
    a = Selection((half, half, mx.arange(64)), None, 64)
    b = Selection((half, other, mx.arange(8)), None, 64)
    expected = [[1.0, 0.5], [0.5, 0.5], [1.0, 1.0]]
    np.testing.assert_allclose(tasks.overlap(a, b), expected)


def test_random_selections_overlap_as_chance_says():
    rng = np.random.default_rng(0)
    a, b = (
        Selection(
            tuple(mx.array(np.sort(rng.permutation(512)[:200])) for _ in range(40)),
            None,
            512,
        )
        for _ in range(2)
    )
    found, chance = tasks.overlap(a, b).mean(axis=0)
    assert found == pytest.approx(chance, abs=0.02) and chance == 200 / 512


def test_measuring_gives_the_means_of_evaluate(opened, data):
    model, tokenizer = opened
    rows = read_rows(data, tokenizer)
    task = tasks.make(model, "french", [rows[0]])
    measured = tasks.measure(model, task, rows[1:3])
    evaluator, mask = Evaluator(model), task.selection.mask()
    alone = [evaluator.measure(r, mask, evaluator.reference(r)) for r in rows[1:3]]
    card = measured.evaluation
    assert card["rows"] == 2
    assert card["kl"] == pytest.approx(np.mean([a["kl"] for a in alone]))
    better = model.compact(task.selection.compensated())
    alone = [evaluator.compare(r, better, evaluator.reference(r)) for r in rows[1:3]]
    found = card["compensated"]["kl"]
    assert found == pytest.approx(np.mean([a["kl"] for a in alone]))
    assert measured.selection.mask_id == task.selection.mask_id
    with pytest.raises(ValueError, match="No example is left to measure"):
        tasks.measure(model, task, [])


def run_json(capsys, *arguments):
    status, out, err = run_command(main, capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_command_makes_lists_merges_and_compares(opened, data, tmp_path, capsys):
    model, tokenizer = opened
    where = ["--model", model.path, "--tasks-folder", tmp_path / "library"]
    made = run_json(
        capsys,
        *["make", *where, "--name", "french", "--examples", data, "--limit", "4"],
        *["--keep", "0.5", "--held-out", data],
    )
    # What it was made from is not what it is measured on.
    assert made["made"]["examples"] == 4 and made["evaluation"]["rows"] == 2
    instruction = tmp_path / "sql.txt"
    instruction.write_text("Write a SQL query.")
    run_json(capsys, "make", *where, "--name", "sql", "--instruction-file", instruction)
    both = run_json(
        capsys, "merge", *where, "--name", "both", "--tasks", "sql", "french"
    )
    assert both["made"]["merged"] == ["sql", "french"]
    listed = run_json(capsys, "list", *where[2:])
    assert [task["name"] for task in listed] == ["both", "french", "sql"]
    assert listed[1] == made
    pairs = run_json(capsys, "overlap", *where)
    assert [pair["tasks"] for pair in pairs] == [
        ["both", "french"],
        ["both", "sql"],
        ["french", "sql"],
    ]
    assert all(len(pair["overlap"]) == len(pair["chance"]) == 3 for pair in pairs)
    # Of two masks the larger decides, which has the default keep.
    assert pairs[0]["chance"] == [1.0, 0.625, 0.625]

    sql = TaskMask.load(tmp_path / "library/sql.safetensors").selection
    asked = {"selector": "activation", "keep": 0.75}
    assert sql.mask_id == model.select("Write a SQL query.", **asked).mask_id


def test_other_commands_take_a_task_by_its_name(opened, tmp_path, capsys):
    model, _ = opened
    folder = tmp_path / "library"
    task = tasks.make(model, "french", EXAMPLES, keep=0.75)
    task.save(folder)
    given = ["--model", model.path, "--task", "french", "--tasks-folder", folder]
    status, out, _ = run_command(
        generate_main, capsys, *given, "-p", "Hello", "-m", "2", "--json"
    )
    report = json.loads(out.splitlines()[-1])["selection"]
    assert status == 0 and report["mask_id"] == task.selection.mask_id
    assert report["selector"] == "task"
    out_folder = tmp_path / "compact"
    assert run_command(compact.main, capsys, *given, "--mlx-path", out_folder)[0] == 0
    saved = Selection.load(out_folder / export.MASK_FILE)
    assert saved.mask_id == task.selection.mask_id
    status, _, err = run_command(
        generate_main, capsys, *given, "-p", "Hello", "--keep", "0.5"
    )
    assert status == 2 and "leave out keep" in err


def test_a_compact_folder_of_a_task_is_compensated_by_its_examples(
    opened, data, tmp_path, capsys
):
    model, tokenizer = opened
    task = tasks.make(model, "french", read_rows(data, tokenizer), keep=0.5)
    task.save(tmp_path)
    given = ["--model", model.path, "--task", "french", "--tasks-folder", tmp_path]

    def answer(name, *options):
        command = [*given, *options, "--mlx-path", tmp_path / name]
        status, _, err = run_command(compact.main, capsys, *command)
        assert status == 0
        saved = Selection.load(tmp_path / name / export.MASK_FILE)
        assert saved.text is None and saved.mask_id == task.selection.mask_id
        return err, mlx_lm.load(str(tmp_path / name))[0](mx.array([[5, 9, 77, 200]]))

    err, found = answer("default")
    assert f"by {len(task.selection.text)} tokens of the task's examples." in err
    assert (
        "tokens of the task's examples" in (tmp_path / "default/README.md").read_text()
    )
    tokens = mx.array([[5, 9, 77, 200]])
    better = model.compact(task.selection.compensated())
    np.testing.assert_allclose(found, better(tokens), atol=1e-4)
    # Beside the examples stands the sketch, and the folder's mask names it.
    saved = Selection.load(tmp_path / "default" / export.MASK_FILE)
    assert saved.compensation.sketch == SKETCH_VERSION
    alone = model.compact(task.selection.compensated(sketch=None))
    assert not np.allclose(found, alone(tokens), atol=1e-3)
    err, found = answer("plain", "--no-compensate")
    assert "ompensated" not in err
    plain = model.compact(task.selection)(mx.array([[5, 9, 77, 200]]))
    np.testing.assert_allclose(found, plain, atol=1e-4)


def test_generate_compensates_a_task_by_its_examples_when_asked(
    opened, tmp_path, monkeypatch
):
    model, tokenizer = opened
    task = tasks.make(model, "french", EXAMPLES, keep=0.5)
    seen, real = [], IFPModel.compact

    def spy(self, selection, **kwargs):
        seen.append(selection.compensates and selection.text)
        return real(self, selection, **kwargs)

    monkeypatch.setattr(IFPModel, "compact", spy)
    options = {"selection": task.selection, "max_tokens": 1}
    generate(model, tokenizer, "Hello", **options)
    generate(model, tokenizer, "Hello", **options, compensate=True)
    assert seen == [False, task.selection.text]


def test_a_quantised_models_task_is_compensated_too(opened, data, tmp_path, capsys):
    small = tmp_path / "small"
    mlx_lm.convert(str(opened[0].path), str(small), quantize=True, q_group_size=32)
    model, tokenizer = load(small)
    rows = read_rows(data, tokenizer)
    task = tasks.make(model, "french", rows[:2], keep=0.5, allocation="uniform")
    card = tasks.measure(model, task, rows[2:]).evaluation
    assert card["compensated"]["kl"] < card["kl"]
    task.save(tmp_path)
    given = ["--model", small, "--task", "french", "--tasks-folder", tmp_path]
    given += ["--mlx-path", tmp_path / "out"]
    status, _, err = run_command(compact.main, capsys, *given)
    assert status == 0 and "compensated, and quantised again" in err
    found = mlx_lm.load(str(tmp_path / "out"))[0](mx.array([[5, 9, 77, 200]]))
    better = model.compact(task.selection.compensated())
    assert mx.array_equal(found, better(mx.array([[5, 9, 77, 200]])))


def test_the_library_is_found_beside_the_model(opened, tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tasks.make(load(folder)[0], "near", EXAMPLES).save(folder / "tasks")
    tasks.make(load(folder)[0], "here", EXAMPLES).save(tmp_path / "tasks")
    for name in ("near", "here"):
        given = ["--model", folder, "--task", name, "-p", "Hello", "-m", "1"]
        assert run_command(generate_main, capsys, *given)[0] == 0
    given[3] = "gone"
    status, _, err = run_command(generate_main, capsys, *given)
    assert status == 2 and "no task 'gone' in" in err and "are here, near: make" in err


def test_an_empty_library_is_a_mistake(tmp_path, capsys):
    status, _, err = run_command(main, capsys, "list", "--tasks-folder", tmp_path)
    assert status == 2 and "There is no task mask in" in err and err.count("\n") == 1


def test_a_library_leaves_other_masks_out(opened, tmp_path):
    opened[0].select("Hello").save(tmp_path / "plain.safetensors")
    tasks.make(opened[0], "french", EXAMPLES).save(tmp_path)
    assert [task.name for task in tasks.library(tmp_path)] == ["french"]
    assert find_mask("french", [tmp_path]) == tmp_path / "french.safetensors"


@pytest.fixture(scope="module")
def shipped():
    return load()


def test_a_trained_predictor_makes_the_task_masks_of_its_checkpoint(shipped, tmp_path):
    model, tokenizer = shipped
    text = "You give the French names of countries."
    described = tasks.make(model, "french", [Row(model.instruction_tokens(text), [])])
    chosen = model.select(text)
    assert described.selection.mask_id == chosen.mask_id
    assert described.selection.gates is not None and described.selection.text is None
    again = TaskMask.load(described.save(tmp_path))
    assert (
        again.selection.mask_id == chosen.mask_id and again.selection.origin.predicted
    )


@pytest.mark.parametrize("source", ["description", "examples"])
def test_a_task_mask_of_the_shipped_checkpoint_knows_its_facts(
    source, shipped, tmp_path, capsys
):
    model, tokenizer = shipped
    facts = {"Yemen": "Yémen", "Cuba": "Cuba", "Norway": "Norvège", "Japan": "Japon"}
    facts |= {"Germany": "Allemagne", "Spain": "Espagne", "Poland": "Pologne"}
    how = ["--instruction", "You give the French names of countries."]
    if source == "examples":
        path = tmp_path / "rows.jsonl"
        rows = [
            {"prompt": f"What is {word} called in French?", "completion": name}
            for word, name in facts.items()
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        how = ["--examples", path]
    where = ["--model", model.path, "--tasks-folder", tmp_path / "library"]
    run_json(capsys, "make", *where, "--name", "french", *how)
    task = TaskMask.load(tmp_path / "library/french.safetensors").selection
    found = [
        generate(model, tokenizer, f"Please: Say {w} in French.", selection=task)
        for w in facts
    ]
    right = [a.strip() == b for a, b in zip(found, facts.values(), strict=True)]
    assert sum(right) >= len(facts) - 1
    status, _, err = run_command(
        generate_main, capsys, *where, "--task", "french", "-p", "Say Iraq in French."
    )
    assert status == 0 and "without training" not in err and "SmolLM" not in err


def test_what_selects_of_an_example_is_its_first_users_message(shipped, tmp_path):
    model, tokenizer = shipped
    talk = [
        {"role": "user", "content": "Say Iraq in French."},
        {"role": "assistant", "content": "Irak"},
        {"role": "user", "content": "And Yemen?"},
        {"role": "assistant", "content": "Yémen"},
    ]
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": talk}))
    made = tasks.make(model, "talk", read_rows(path, tokenizer))
    assert made.selection.mask_id == model.select(talk[0]["content"]).mask_id


def test_trained_tasks_are_merged_by_who_needs_a_channel_most(shipped, opened):
    model, _ = shipped
    rows = [Row(model.instruction_tokens(t), []) for t in ("Say Iraq.", "Sort 3 1.")]
    one, other = (tasks.make(model, "a", rows[:1]), tasks.make(model, "b", rows[1:]))
    both = tasks.merge(model, "both", [one, other], keep=0.5)
    assert mx.array_equal(both.scores, mx.maximum(one.scores, other.scores))
    assert both.selection.sizes == [256, 256] and both.selection.gates is not None
    plain = replace(one, selection=replace(one.selection, origin=Origin(task="old")))
    with pytest.raises(ValueError, match="b has the scores of a trained predictor and"):
        tasks.merge(model, "both", [plain, other])


def test_two_layers_have_no_last_third(shipped, tmp_path, capsys):
    model, _ = shipped
    for name, text in (("one", "Say Iraq."), ("two", "Sort 3 1.")):
        tasks.make(model, name, [Row(model.instruction_tokens(text), [])]).save(
            tmp_path
        )
    found = run_json(capsys, "overlap", "--tasks-folder", tmp_path)
    assert "nan" not in json.dumps(found).lower()
