import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ifp_mlx.selection.masks import Origin, Selection
from ifp_mlx.selection.top_k import select, soft_top_k
from ifp_mlx.selection.widths import layer_sizes, target_size


def random_scores(seed, *shape):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def by_bisection(scores, k, temperature):
    s = np.array(scores, dtype=np.float64) / temperature
    low, high = s.min() - 50, s.max() + 50
    for _ in range(200):
        tau = (low + high) / 2
        if np.minimum(1, np.exp(np.minimum(s - tau, 0))).sum() > k:
            low = tau
        else:
            high = tau
    return np.minimum(1, np.exp(np.minimum(s - tau, 0)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.floats(0.02, 4.0),
    st.data(),
)
def test_soft_top_k_is_the_exact_fixed_point(seed, channels, temperature, data):
    k = data.draw(st.integers(1, channels))
    scores = random_scores(seed, channels)
    soft = np.array(soft_top_k(scores, k, temperature))
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-6
    assert soft.sum() == pytest.approx(k, abs=1e-3)
    np.testing.assert_allclose(soft, by_bisection(scores, k, temperature), atol=1e-4)


def test_soft_top_k_handles_equal_scores_and_leading_dimensions():
    assert np.allclose(np.array(soft_top_k(mx.zeros((2, 3, 8)), 2)), 0.25)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gradient_of_soft_top_k_matches_differences_and_keeps_the_budget(temperature):
    scores, weight = random_scores(1, 12), random_scores(2, 12)

    def loss(s):
        return (soft_top_k(s, 4, temperature) * weight).sum()

    gradient = np.array(mx.grad(loss)(scores))
    step = 1e-3
    for i in range(12):
        up, down = np.array(scores), np.array(scores)
        up[i] += step
        down[i] -= step
        difference = (loss(mx.array(up)) - loss(mx.array(down))).item() / (2 * step)
        assert gradient[i] == pytest.approx(difference, abs=5e-3)
    budget = mx.grad(lambda s: soft_top_k(s, 4, temperature).sum())(scores)
    assert np.abs(np.array(budget)).max() < 1e-4


@pytest.mark.parametrize("k", [0, 9])
def test_soft_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and the 8"):
        soft_top_k(mx.zeros(8), k)


def test_select_takes_the_best_channels_and_the_lower_index_of_equals():
    scores = mx.array([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    selection = select(scores, [2, 3])
    assert [i.tolist() for i in selection.indices] == [[0, 2], [0, 1, 2]]
    assert all(i.dtype == mx.int32 for i in selection.indices)
    assert selection.target_size is None and selection.sizes == [2, 3]


def test_select_by_blocks_keeps_whole_blocks():
    scores = mx.array([[0.0, 9.0, 5.0, 5.0, 1.0, 1.0]])
    assert select(scores, [2], granularity=2).indices[0].tolist() == [2, 3]
    assert select(scores, [4], granularity=2).indices[0].tolist() == [0, 1, 2, 3]


def test_soft_gates_are_lambda_on_the_kept_channels():
    scores = random_scores(3, 2, 10)
    selection = select(scores, [4, 4], gates="soft", temperature=0.5)
    for row, index, gate in zip(
        scores, selection.indices, selection.gates, strict=True
    ):
        expected = np.array(soft_top_k(row, 4, 0.5))[np.array(index)]
        np.testing.assert_allclose(np.array(gate), expected)


def test_the_dense_mask_holds_the_gates():
    selection = Selection((mx.array([1, 2]),), (mx.array([0.5, 1.0]),), 4)
    assert selection.mask().tolist() == [[0.0, 0.5, 1.0, 0.0]]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        select(mx.array([[0.0, float("nan")]]), [1])


@pytest.mark.parametrize(
    ("keep", "granularity", "k"),
    [(1.0, 1, 1536), (0.5, 1, 768), (0.33, 64, 512), (0.0001, 1, 1), (0.01, 64, 64)],
)
def test_keep_is_rounded_to_the_granularity(keep, granularity, k):
    assert target_size(1536, keep, granularity) == k


@pytest.mark.parametrize("keep", [0, 1.5, -0.5, float("nan")])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep={keep} is not a share"):
        target_size(1536, keep)


def test_first_layer_allocation_spends_the_same_total():
    sizes = layer_sizes(768, 30, 1536, "first-layer")
    assert sizes[0] == 1536 and len(set(sizes[1:])) == 1
    assert 30 * 768 - 29 < sum(sizes) <= 30 * 768
    assert layer_sizes(768, 30, 1536, "uniform") == [768] * 30
    assert layer_sizes(512, 30, 1536, "first-layer", 64)[1] == 448


def test_sizes_that_do_not_fit_name_the_nearest_valid_ones():
    with pytest.raises(
        ValueError, match="target_size=200 .* 64 channels; use 192 or 256"
    ):
        layer_sizes(200, 4, 1536, "uniform", 64)
    with pytest.raises(ValueError, match="target_size=30 .* use 64"):
        layer_sizes(30, 4, 1536, "uniform", 64)
    with pytest.raises(
        ValueError, match="target_size=1537 must be between 1 and the 1536"
    ):
        layer_sizes(1537, 4, 1536, "uniform")
    with pytest.raises(
        ValueError, match="100 channels in each of 4 .* whole first layer"
    ):
        layer_sizes(100, 4, 1536, "first-layer")
    with pytest.raises(
        ValueError, match="allocation='energy' is unknown; choose uniform"
    ):
        layer_sizes(100, 4, 1536, "energy")


@pytest.mark.parametrize("gates", ["binary", "soft"])
def test_a_mask_file_gives_the_selection_back(tmp_path, gates):
    made = select(random_scores(4, 3, 16), [16, 4, 4], gates=gates)
    text = "Übersetze ins Französische."
    made = replace(made, origin=Origin(selector="activation", instruction=text))
    made.save(tmp_path / "french.mask")
    read = Selection.load(tmp_path / "french.mask")
    assert read.mask_id == made.mask_id and read.origin == made.origin
    assert mx.array_equal(read.mask(), made.mask())
    assert (read.gates is None) == (gates == "binary")
    assert [p.name for p in tmp_path.iterdir()] == ["french.mask"]


def test_mask_id_is_the_same_in_another_process():
    code = (
        "import mlx.core as mx; from ifp_mlx import Selection; "
        "print(Selection((mx.array([1, 5]), mx.array([0])), None, 8).mask_id)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = Selection((mx.array([1, 5]), mx.array([0])), None, 8).mask_id
    assert run.stdout.strip() == here and len(here) == 12
    assert here != Selection((mx.array([1]), mx.array([0, 5])), None, 8).mask_id


def test_files_that_are_no_masks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mask file .*gone"):
        Selection.load(tmp_path / "gone")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is not a readable mask file"):
        Selection.load(tmp_path / "text")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(2)})
    with pytest.raises(ValueError, match="other.safetensors is not a mask file"):
        Selection.load(tmp_path / "other.safetensors")


def test_a_mask_file_with_impossible_content_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    about = {"format": "ifp_mlx.mask.1", "channels": "4", "mask_id": "0" * 12}
    for indices in ([0, 9], [2, 1], [1, 1], [-1, 2]):
        arrays = {"layers.0.indices": mx.array(indices, dtype=mx.int32)}
        mx.save_safetensors(str(path), arrays, metadata=about)
        with pytest.raises(ValueError, match="damaged.*impossible indices"):
            Selection.load(path)
    arrays = {"layers.0.indices": mx.array([0, 1], dtype=mx.int32)}
    mx.save_safetensors(str(path), arrays, metadata=about)
    with pytest.raises(ValueError, match="does not match its mask_id"):
        Selection.load(path)


def test_a_mask_of_another_model_is_refused():
    norm = mx.array([1.0, 2.0, 3.0], dtype=mx.float16)
    mask = Selection((mx.array([0]), mx.array([1])), None, 8, {}, norm)
    mask.check_fits(2, 8, norm)
    mask.check_fits(2, 8, (norm * 1.004).astype(mx.float16))  # another dtype's rounding
    with pytest.raises(ValueError, match="2 layers of 8 channels, but this one has 3"):
        mask.check_fits(3, 8, norm)
    with pytest.raises(ValueError, match="another model of the same shape"):
        mask.check_fits(2, 8, norm[::-1])


def test_what_was_measured_is_the_same_before_and_after_it_was_saved():
    measured = {"agreement": 2 / 3, "kl": 0.46018478, "router_mass": 1 / 7}
    origin = Origin(**measured, requantisation_kl=0.0012345678)
    assert Origin.from_text(origin.as_text()) == origin
    assert origin.kl == 0.4602
