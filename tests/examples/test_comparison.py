"""The comparison's mix has no leaks, and its rows, tables and picture hold together."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error

pytest.importorskip("babel")
pytest.importorskip("reasoning_gym")

from examples.benchmarks.comparison import checkpoint, report
from examples.benchmarks.comparison.corpus import Corpus, describe, tokenizer
from examples.benchmarks.comparison.data import write_shapes
from examples.benchmarks.comparison.lab import Scale, Trained, means, overlaps
from examples.benchmarks.comparison.rows import ROWS, Table, split
from examples.benchmarks.comparison.run import RESULTS, Bench, main
from examples.benchmarks.comparison.tasks import all_tasks, examples
from examples.benchmarks.comparison.tasks import test_examples as draw_tests
from ifp_mlx import load
from ifp_mlx.files.config import read_config
from ifp_mlx.slicing.stock import build
from ifp_mlx.storage.folder import SHIPPED
from ifp_mlx.training.maskers import Budget, FixedMask
from ifp_mlx.training.recipe import TrainConfig

TASKS = all_tasks()


def test_no_test_wording_and_no_test_instance_is_trained():
    trained = examples(TASKS, "train", 3000, seed=0)
    tested = draw_tests(TASKS, 20, seed=0)
    assert not {e.prompt for e in trained} & {e.prompt for e in tested}
    for task in TASKS:
        assert not set(task.wordings("train")) & set(task.wordings("test"))
        assert not task.held_out or all(TASKS[e.task] != task for e in trained)


def test_every_word_of_a_held_out_wording_is_trained():
    for task in TASKS:
        words = [set(" ".join(task.wordings(s)).split()) for s in ("train", "test")]
        assert words[1] <= words[0]


def test_facts_share_their_keys_so_that_a_key_does_not_tell_the_answer():
    asked = [task.facts for task in TASKS if task.facts and "Egypt" in task.facts]
    assert len(asked) >= 10
    assert len({facts["Egypt"] for facts in asked}) >= 8


def test_skills_are_answered_correctly():
    checks = {
        "sort": lambda q: " ".join(map(str, sorted(map(int, q.split())))),
        "reverse": lambda q: q[::-1],
        "filter": lambda q: " ".join(n for n in q.split() if int(n) > 50) or "none",
        "sum": lambda q: str(sum(map(int, q.split(" and ")))),
    }
    by_name = {task.name: task for task in TASKS}
    for name, answer in checks.items():
        for number in range(20):
            question, found = by_name[name].draw(number)
            assert found == answer(question)


def test_the_same_seed_draws_the_same_examples():
    draws = [examples(TASKS, "train", 50, seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_only_the_answer_counts_and_the_predictor_never_sees_it():
    corpus = Corpus(draw_tests(TASKS, 2, seed=0), 8)
    end = tokenizer().token_to_id("<|end|>")
    for batch in corpus.all():
        tokens, loss = np.array(batch.tokens), np.array(batch.loss_mask)
        for row in range(len(tokens)):
            prompt = np.array(batch.instruction)[row, : int(batch.lengths[row])]
            assert (tokens[row, : len(prompt)] == prompt).all()
            counted = np.flatnonzero(loss[row])
            assert counted[0] == len(prompt)
            assert tokens[row, counted[-1]] == end
    assert sum(len(b.tokens) for b in corpus.all()) == len(corpus.rows)


def test_descriptions_can_select_for_whole_tasks():
    corpus = Corpus(draw_tests(TASKS, 3, seed=0), 8)
    describe(TASKS, corpus)
    selecting = {(row[3], tuple(row[0])) for row in corpus.rows}
    assert len(selecting) == len(TASKS)


def test_every_sum_has_instances_that_are_trained_and_most_some_that_are_not():
    (add,) = [task for task in TASKS if task.name == "sum"]
    drawn = {
        split: {e.answer for e in examples([add], "train", 800, 0) if split == "train"}
        | {e.answer for e in draw_tests([add], 200, 0) if split == "test"}
        for split in ("train", "test")
    }
    assert drawn["test"] <= drawn["train"] and len(drawn["test"]) > 12
    assert len(drawn["train"]) >= 17


def test_the_crowded_mix_has_more_facts_and_its_small_model_less_room():
    mixes = ("plain", "crowded")
    plain, crowded = (sum(len(t.facts or ()) for t in all_tasks(m)) for m in mixes)
    assert crowded > 1.5 * plain
    scales = [Table.read(ROWS, mix).scale for mix in mixes]
    small = [scale.compute(scale.kept) for scale in scales]
    assert small[1] < 0.5 * small[0]


@pytest.mark.parametrize("mix", ["plain", "crowded", "shipped"])
def test_every_row_of_the_file_is_settings_of_the_trainer(mix):
    table = Table.read(ROWS, mix)
    for row, about in table.rows.items():
        assert table.needs(row)[-1] == row
        assert "about" in about or about.get("hidden")
        settings = table.settings(row, 0.01, 0)
        where = {"model": "m", "data": "d", "output": "o"}
        if "select" not in about:
            TrainConfig(**settings | where).check()


def test_a_model_that_is_split_is_the_same_if_every_expert_speaks_evenly(tmp_path):
    write_shapes(tmp_path, Scale(channels=64, kept=64))  # as many experts as there are
    start = build(read_config(tmp_path / "large" / "config.json"))
    start.save_weights(str(tmp_path / "large" / "model.safetensors"))
    split(tmp_path / "large", tmp_path / "experts", 0, tmp_path / "split")
    mixture = load(tmp_path / "split")[0].dense()
    tokens = mx.array([[5, 9, 2, 30]])
    for layer in mixture.layers:
        router = layer.block_sparse_moe.gate
        assert 0 < float(mx.abs(router.weight).max()) < 0.1
        router.weight = mx.zeros_like(router.weight)
    assert relative_error(mixture(tokens), start(tokens)) < 1e-5


@pytest.mark.long
def test_a_row_is_trained_by_the_trainer_goes_on_and_is_tabulated(tmp_path, capsys):
    paths = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    command = ["--tiny", "--mix", "plain", "--rates", "0.01", "--seeds", "0"]
    main([*command, *paths, "--rows", "static", "activation"])
    folder = tmp_path / "results" / "plain"
    found = json.loads((folder / "static-0.01-0.json").read_text())
    assert set(found["accuracy"]) == {task.name for task in TASKS}
    # Four steps of its start, fewer for four of a smaller model, and 2,048 examples read
    # for its mask, which are 64 batches and a third of a step each.
    assert 21 < found["compute"] - 4 < 21.4 + 4
    assert json.loads((folder / "activation-0.01-0.json").read_text())["compute"] == 8
    capsys.readouterr()
    main([*command, *paths, "--rows", "static"])
    assert capsys.readouterr().out == ""  # nothing is left to do
    text = report.tables("plain", folder)
    line = next(part for part in text.splitlines() if "activation × weight" in part)
    assert f"{found['mean']:.3f}" in line and "Not run: dense, all" in text


def test_the_rate_is_chosen_by_a_seed_that_is_in_no_table(tmp_path):
    table = Table.read(ROWS, "plain")
    bench = Bench(table, tmp_path, tmp_path)
    run = {"row": "ifp", "mean": 0.0, "per_task": {}, "overlap": None}
    for rate in table.rates:
        best = run | {"rate": rate, "mean": float(rate == 0.003), "seed": table.chooses}
        (tmp_path / f"ifp-{rate:g}-{table.chooses}.json").write_text(json.dumps(best))
        other = run | {"rate": rate, "seed": 0}
        (tmp_path / f"ifp-{rate:g}-0.json").write_text(json.dumps(other))
    assert bench.rate("ifp") == 0.003
    _, results = report.load_results(tmp_path, table)
    assert [run["rate"] for run in results["ifp"]] == [0.003]


@pytest.mark.parametrize("best", [0.0015, 0.006, 0.012, 0.024])
def test_a_rate_at_the_end_of_the_grid_is_not_taken_before_the_next_was_tried(
    best, tmp_path, monkeypatch
):
    bench = Bench(Table.read(ROWS, "plain"), tmp_path, tmp_path)
    tried = []

    def measured(row, rate, seed):
        tried.append(rate)
        return {"mean": 1 / (1 + abs(np.log(rate / best)))}

    monkeypatch.setattr(bench, "measured", measured)
    assert bench.rate("ifp") == best
    assert min(tried) < best < max(tried)


def test_rates_that_are_all_alike_are_not_tried_for_ever(tmp_path, monkeypatch):
    bench = Bench(Table.read(ROWS, "plain"), tmp_path, tmp_path)
    monkeypatch.setattr(bench, "measured", lambda *about: {"mean": 0.0})
    assert bench.rate("ifp") == 0.0015


def test_equal_compute_is_reckoned_from_a_run_at_any_rate(tmp_path, monkeypatch):
    bench = Bench(Table.read(ROWS, "plain"), tmp_path, tmp_path)
    known = bench.folder("ifp", 0.024, 0) / "comparison.json"
    known.parent.mkdir(parents=True)
    known.write_text("{}")
    made = []

    def trained(row, rate, seed):
        made.append((row, rate))
        return {"multiplications": 5 if row == "ifp" else 2}  # the rest is the start

    one = SimpleNamespace(cost=SimpleNamespace(warm_start=0, total=0.5))
    monkeypatch.setattr(bench, "trained", trained)
    monkeypatch.setattr(bench, "config", lambda *about: None)
    monkeypatch.setattr("examples.benchmarks.comparison.run.estimate", lambda c: one)
    assert bench.steps("static_equal", 0.003, 0) == 10
    assert ("ifp", 0.024) in made and ("ifp", 0.003) not in made


def test_a_mix_may_have_rates_of_its_own():
    assert Table.read(ROWS, "plain").rates == [0.0015, 0.003, 0.006]
    assert Table.read(ROWS, "crowded").rates == [0.003, 0.006, 0.012]


def test_overlap_within_a_fixed_task_mask_is_whole_and_between_is_counted():
    mask = np.zeros((len(TASKS), 1, 4), dtype=np.float32)
    mask[:, :, 0] = 1
    mask[::2, :, 1], mask[1::2, :, 2] = 1, 1
    trained = Trained(None, FixedMask(mx.array(mask)), Budget(2))
    batches = Corpus(draw_tests(TASKS, 2, seed=0), 8).all()
    found = overlaps(trained, batches, len(TASKS))
    assert found["within"] == 1
    assert found["by_depth"][0][0][1] == 0.5
    assert found["by_depth"][0][0][2] == 1
    assert found["chance"] == 0.5


def test_the_pages_tables_are_those_of_the_results():
    page = Path(report.__file__).with_name("README.md").read_text(encoding="utf-8")
    measured = [mix for mix in report.MIXES if any((RESULTS / mix).glob("*.json"))]
    assert measured
    for mix in measured:
        for part in report.tables(mix, RESULTS / mix).split("\n\n"):
            assert part in page


SMALL = ("static", "static_distil", "moe", "dense_small")


class Means:
    """What was measured of a mix: by row, and by seed."""

    def __init__(self, mix):
        table = Table.read(ROWS, mix)
        _, results = report.load_results(RESULTS / mix, table)
        self.runs = {row: {r["seed"]: r for r in by} for row, by in results.items()}

    def mean(self, row, of="mean"):
        return np.mean([run[of] for run in self.runs[row].values()])

    def ahead(self, row, of):
        """Return by how much a row is ahead on each seed, the least first."""
        mine, other = self.runs[row], self.runs[of]
        return sorted(mine[seed]["mean"] - other[seed]["mean"] for seed in (0, 1, 2))


def prose(path):
    return " ".join(path.read_text(encoding="utf-8").split())


def test_the_pages_prose_says_the_means_of_the_results():
    found, page = Means("plain"), prose(Path(report.__file__).with_name("README.md"))
    least = min(found.ahead("ifp", row)[0] for row in SMALL)
    assert f"on every seed, by {least:.3f}" in page
    worst = min(r["mean"] for r in found.runs["ifp"].values())
    best = max(r["mean"] for row in SMALL for r in found.runs[row].values())
    assert (
        f"worst seed ({worst:.3f}) is above the best of any of these ({best:.3f})"
        in page
    )
    mean = {row: found.mean(row) for row in found.runs}
    for row in ("dense_small_equal", "static_equal"):
        low, *_, high = found.ahead(row, "ifp")
        assert f"by {low:.3f} to {high:.3f}" in page and f"{mean[row]:.3f}" in page
    assert f"{mean['dense_small_equal']:.3f} against {mean['ifp']:.3f}" in page
    assert f"IFP has {mean['ifp_words']:.3f}, with names {mean['ifp']:.3f}" in page
    assert f"true task have {mean['task_random']:.3f}, IFP" in page
    assert f"from the dense model, they have {mean['activation']:.3f}." in page
    assert f"({mean['static_distil']:.3f} against {mean['static']:.3f} on" in page
    costs = (found.mean(row, "compute") for row in ("static_distil", "ifp"))
    assert "({:,.0f} against {:,.0f})".format(*costs) in page
    assert f"hurts here**: {mean['ifp_last']:.3f} with" in page
    assert f"{mean['ifp_each']:.3f} where each chunk has its own" in page


def test_what_the_page_says_of_the_mix_with_less_room_was_measured():
    found, page = Means("crowded"), prose(Path(report.__file__).with_name("README.md"))
    page = page.partition("## A mix with less room")[2]
    mean = {row: found.mean(row) for row in found.runs}
    assert (
        f"{mean['ifp']:.3f} against {mean['dense_small']:.3f} (dense-small), "
        f"{mean['static']:.3f} (static pruning), {mean['static_distil']:.3f} (with "
        f"distillation) and {mean['moe']:.3f} (mixture)"
    ) in page
    least = min(found.ahead("ifp", row)[0] for row in SMALL)
    assert f"by {least:.3f} and more on every seed" in page
    for row in ("dense_small_equal", "static_equal"):
        low, *_, high = found.ahead("ifp", row)
        assert f"by {low:.3f} to {high:.3f} ({mean[row]:.3f})" in page
    low, *_, high = found.ahead("dense_full", "ifp")
    assert f"it was cut from ({mean['dense_full']:.3f})" in page
    assert f"first mix, by {low:.3f} to {high:.3f}" in page
    rows = ("ifp", "dense_small_equal")
    facts, skills = ([found.mean(r, of) for r in rows] for of in ("facts", "skills"))
    assert (
        "IFP has {:.3f} of them, dense-small at that compute {:.3f}".format(*facts)
        in page
    )
    assert "they have {:.3f} and {:.3f}".format(*skills) in page
    assert f"{mean['ifp_per_task']:.3f}, where each question's own has" in page


def test_the_overview_has_the_means_of_both_mixes():
    page = prose(Path(report.__file__).parents[1] / "README.md")
    page = page.partition("## Trained")[2].partition("## Mixtures")[0]
    plain, crowded = Means("plain"), Means("crowded")
    for row in (*SMALL, "ifp", "dense_small_equal", "static_equal"):
        assert f"{plain.mean(row):.3f}" in page and f"{crowded.mean(row):.3f}" in page
    assert f"{plain.mean('ifp_words'):.3f}" in page


@pytest.mark.long
def test_the_package_checkpoint_answers_paraphrases_as_its_card_says():
    found = json.loads((RESULTS / "checkpoint.json").read_text(encoding="utf-8"))
    model, tokenizer = load()
    asked = checkpoint.paraphrases()
    right = checkpoint.answered(model, tokenizer, asked)
    assert np.mean(right) == pytest.approx(found["paraphrased"], abs=0.02)
    tasks = all_tasks(checkpoint.MIX)
    failed = [tasks[e.task].name for e, r in zip(asked, right, strict=True) if not r]
    languages = [name for name in failed if name.startswith("language→")]
    assert len(languages) > 0.5 * len(failed)


def test_the_package_checkpoints_card_says_what_was_found():
    found = json.loads((RESULTS / "checkpoint.json").read_text(encoding="utf-8"))
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for task, value in found["accuracy"].items():
        assert re.search(rf"^\| {task} \| .* \| {value:.2f} \|$", card, re.MULTILINE)
    curve = " | ".join(f"{value:.3f}" for value in found["keeps"].values())
    assert f"| facts | {curve} |" in card
    words = " ".join(card.split())
    assert (
        f"Mean over facts {found['facts']:.2f}, over skills {found['skills']:.2f}"
        in words
    )
    assert f"over facts in small letters {found['lower']:.2f}." in words
    assert f"{found['paraphrased']:.1%} are answered right" in words
    assert f"`ifp_mlx.tasks make`, {found['described']:.1%} of the facts" in words
    assert f"and {found['shown']:.1%} if from 16 questions" in words


def test_what_the_package_checkpoint_was_made_for_it_does():
    found = json.loads((RESULTS / "checkpoint.json").read_text(encoding="utf-8"))
    assert found["paraphrases"] == 200 and found["paraphrased"] >= 0.85
    assert found["lower"] >= 0.95 and min(found["described"], found["shown"]) >= 0.95
    curve = [*found["keeps"].values()]  # from the own keep, a quarter, to all
    assert min(curve) >= curve[0] - 0.0075


def test_means_leave_the_unseen_family_out():
    accuracy = {task.name: 0.0 if task.held_out else 1.0 for task in TASKS}
    assert means(accuracy, TASKS) == {"facts": 1, "skills": 1, "held_out": 0, "mean": 1}


def test_the_picture_has_a_square_for_every_layer(tmp_path):
    side = len(TASKS)
    layers = np.eye(side)[None].repeat(2, axis=0).tolist()
    found = {"overlap": {"by_depth": layers, "chance": 0.25}}
    report.draw_overlap(found, tmp_path / "p.svg", TASKS)
    text = (tmp_path / "p.svg").read_text()
    assert text.count("layer ") >= 2 and "reverse" in text
