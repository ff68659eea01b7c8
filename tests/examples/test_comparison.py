"""The comparison's mix has no leaks, and its rows, tables and picture hold together."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("babel")
pytest.importorskip("reasoning_gym")

from examples.benchmarks.comparison import report
from examples.benchmarks.comparison.corpus import Corpus, describe, tokenizer
from examples.benchmarks.comparison.groups import (
    agreement,
    kmeans,
    nearest,
    paraphrases,
)
from examples.benchmarks.comparison.lab import Lab, Scale, Trained, means, overlaps
from examples.benchmarks.comparison.rows import ROWS, task_random
from examples.benchmarks.comparison.run import SCALES, main, run_row
from examples.benchmarks.comparison.tasks import all_tasks, examples
from examples.benchmarks.comparison.tasks import test_examples as draw_tests
from examples.benchmarks.comparison.warm import warm_predictor
from ifp_mlx.training.maskers import Budget, FixedMask, PredictorMasker

TASKS = all_tasks()
TINY = Scale(start_steps=2, steps=2, warm_steps=2, test_per_task=2, batch_size=8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(TINY, 0, tmp_path_factory.mktemp("cache"))


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


def test_the_crowded_mix_has_more_facts_and_its_small_model_less_room():
    plain, crowded = (sum(len(t.facts or ()) for t in all_tasks(m)) for m in SCALES)
    assert crowded > 1.5 * plain
    small = [scale.compute(scale.kept) for scale in SCALES.values()]
    assert small[1] < 0.5 * small[0]


def test_a_mix_runs_from_the_command_line_and_is_tabulated(tmp_path):
    results = tmp_path / "results"
    command = ["--mix", "crowded", "--tiny", "--seeds", "0", "--rows", "dense_small"]
    paths = ["--results", str(results), "--cache", str(tmp_path / "cache")]
    main([*command, *paths])
    found = report.load_results(results)
    assert len(found["dense_small"][0]["accuracy"]) == len(all_tasks("crowded"))
    assert "dense-small, 8 steps" in report.curve(found)
    assert "language→eu" in report.tables("crowded", results)


def test_a_chunk_selects_for_another_of_its_task(lab):
    batch = lab.data.chunks(0)
    for row in range(len(batch.tokens)):
        before = np.array(batch.instruction)[row, : int(batch.lengths[row])]
        learned = np.flatnonzero(np.array(batch.loss_mask)[row])
        assert learned[0] == len(before)


def test_overlap_within_a_fixed_task_mask_is_whole_and_between_is_counted():
    mask = np.zeros((len(TASKS), 1, 4), dtype=np.float32)
    mask[:, :, 0] = 1
    mask[::2, :, 1], mask[1::2, :, 2] = 1, 1
    trained = Trained(None, FixedMask(mx.array(mask)), Budget(2), 0, {})
    batches = Corpus(draw_tests(TASKS, 2, seed=0), 8).all()
    found = overlaps(trained, batches, len(TASKS))
    assert found["within"] == 1
    assert found["by_depth"][0][0][1] == 0.5
    assert found["by_depth"][0][0][2] == 1
    assert found["chance"] == 0.5


def test_means_leave_the_unseen_family_out():
    accuracy = {task.name: 0.0 if task.held_out else 1.0 for task in TASKS}
    assert means(accuracy, TASKS) == {"facts": 1, "skills": 1, "held_out": 0, "mean": 1}


def test_an_oracle_row_gives_every_task_its_own_mask_of_the_right_size(lab):
    trained = task_random(lab)
    masks = trained.masker(lab.data(0), trained.budget)
    assert set(np.array(masks.sum(axis=-1)).ravel()) == {TINY.kept}


def test_a_warm_predictor_gives_a_task_described_one_mask_of_its_own(lab):
    predictor, _ = warm_predictor(lab, lab.dense(0))
    trained = Trained(None, PredictorMasker(predictor), Budget(TINY.kept), 0, {})
    found = overlaps(trained, lab.test_batches(described=True), len(TASKS))
    assert found["within"] == 1
    assert found["between"] < 0.5


@pytest.mark.parametrize("row", ["ifp", "static_distil", "activation", "ifp_clusters"])
def test_a_row_runs_and_its_report_can_be_tabulated(row, lab, tmp_path):
    found = run_row(lab, row)
    assert set(found["accuracy"]) == {task.name for task in TASKS}
    assert all(0 <= a <= 1 for a in found["accuracy"].values())
    (tmp_path / f"{row}-0.json").write_text(json.dumps(found))
    about = report.ABOUT | report.CONTROLS
    table = report.main_table(report.load_results(tmp_path), tuple(about))
    line = next(part for part in table.splitlines() if about[row] in part)
    assert f"{found['mean']:.3f}" in line
    assert table.count("not run") >= len(ROWS) - 2


def test_the_picture_has_a_square_for_every_layer(lab, tmp_path):
    side = len(TASKS)
    layers = np.eye(side)[None].repeat(2, axis=0).tolist()
    found = {"overlap": {"by_depth": layers, "chance": 0.25}}
    report.draw_overlap(found, tmp_path / "p.svg", TASKS)
    text = (tmp_path / "p.svg").read_text()
    assert text.count("layer ") >= 2 and "reverse" in text


def test_paraphrases_show_which_words_tell_tasks_apart(tmp_path):
    lab = Lab(replace(TINY, batch_size=128), 0, tmp_path)
    groups = paraphrases(lab)
    assert agreement(lab, groups)["purity"] > 0.7
    batch = lab.data(0)
    unseen = batch._replace(tasks=mx.zeros_like(batch.tasks))
    assert (groups.of(batch) == groups.of(unseen)).all()
    other = batch._replace(instruction=batch.instruction[::-1])
    alone = paraphrases(lab, described=False)
    assert (alone.of(batch) == alone.of(other)).all()
    assert (groups.of(batch) != groups.of(other)).any()


def test_clusters_find_groups_that_lie_apart():
    rng = np.random.default_rng(0)
    middles = rng.normal(0, 10, (4, 5))
    group = np.repeat(np.arange(4), 25)
    points = middles[group] + rng.normal(0, 0.1, (100, 5))
    found = nearest(points, kmeans(points, 4, seed=1))
    assert all(len(set(found[group == g])) == 1 for g in range(4))
    assert len(set(found)) == 4
