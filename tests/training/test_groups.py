"""Which examples belong together, and what a predictor makes of it."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model

from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.training.batches import Batches, Record, in_order
from ifp_mlx.training.groups import groups_of, kmeans, nearest
from ifp_mlx.training.maskers import Budget, PredictorMasker
from ifp_mlx.training.warm_start import group_start, scale_layers
from ifp_mlx.training.watch import mask_overlap

ASKS = ([1, 2], [3, 4, 5])  # two ways to ask for each of three tasks
TASKS = ([20, 21], [30, 31], [40, 41])


def records(named=True, shared=True):
    """Return questions about the same things in other words: the answer is the task's
    and the thing's, whatever the wording.
    """
    found = []
    for task, (one, other) in enumerate(TASKS):
        for thing in range(8):
            for number, words in enumerate(ASKS):
                name = one if number else other
                asked = [*words, one, 60 + thing, name]
                answer = [100 + 10 * task + thing] + ([] if shared else [len(found)])
                tokens = np.array(asked + answer, dtype=np.int32)
                loss = np.arange(len(tokens)) >= len(asked)
                given = np.array(asked, dtype=np.int32)
                found.append(Record(given, tokens, loss, task if named else -1))
    return found


def test_rows_that_name_tasks_are_grouped_by_them():
    assert groups_of(records(), "auto", 0).tolist() == [r.task for r in records()]


def test_rows_without_names_are_grouped_by_words_that_equal_answers_share():
    truth = np.array([record.task for record in records()])
    found = groups_of(records(named=False), "auto", 0)
    pairs = np.zeros((found.max() + 1, 3))
    np.add.at(pairs, (found, truth), 1)
    assert pairs.max(axis=1).sum() / pairs.sum() > 0.9


def test_rows_whose_answers_are_all_different_stay_alone():
    assert groups_of(records(named=False, shared=False), "auto", 0) is None
    assert groups_of(records(), "off", 0) is None


def test_tasks_that_are_not_named_cannot_group():
    with pytest.raises(
        ValueError, match="groups: task needs rows that all have a task"
    ):
        groups_of(records(named=False), "task", 0)


def test_groups_that_lie_apart_are_found():
    rng = np.random.default_rng(0)
    middles = rng.normal(0, 10, (4, 5))
    group = np.repeat(np.arange(4), 25)
    points = middles[group] + rng.normal(0, 0.1, (100, 5))
    found = nearest(points, kmeans(points, 4, seed=1))
    assert all(len(set(found[group == g])) == 1 for g in range(4))
    assert len(set(found)) == 4


def test_masks_begin_the_same_within_a_group_and_apart_between_groups():
    mx.random.seed(0)
    predictor = SparsityPredictor(
        tiny_model("llama", 1, num_hidden_layers=1), 3, 64, 8, pooling="mean"
    )
    some = records()
    batches, later = in_order(some, 8), Batches(some, 8, 0)
    how = {"steps": 60, "rate": 3e-3, "centred": True, "decorrelate": True}
    found = group_start(predictor, tiny_model("llama"), batches, later, **how)
    scale_layers(predictor, batches, centred=True)
    overlap = mask_overlap(PredictorMasker(predictor), batches, Budget(16))
    assert found["rank"] == 2 and found["explained"] > 0.8
    assert overlap.within > 0.8 > overlap.between + 0.2
