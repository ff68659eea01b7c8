import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, tiny_config, tiny_model, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx.selection.predictor import SparsityPredictor

L, F, RANK = 4, 48, 8


def tiny_predictor(family="llama", seed=0, **options) -> SparsityPredictor:
    mx.random.seed(seed)
    backbone = tiny_model(family, seed)
    options = {"config": tiny_config(family), **options}
    return SparsityPredictor(backbone, L, F, RANK, **options)


def tokens_of(*shape, seed=0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 256, shape))


def assert_same(a, b, tolerance=1e-5):
    a, b = np.array(a), np.array(b)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_float32_of_the_llms_shape(family):
    scores = tiny_predictor(family)(tokens_of(2, 5))
    assert scores.shape == (2, L, F)
    assert scores.dtype == mx.float32
    assert np.array(scores).std() > 0


def test_half_precision_weights_still_give_float32_scores():
    predictor = tiny_predictor()
    predictor.set_dtype(mx.bfloat16)
    assert predictor(tokens_of(1, 5)).dtype == mx.float32


def test_the_last_layers_last_token_goes_through_two_linears():
    predictor, tokens = tiny_predictor(), tokens_of(1, 6)
    hidden = predictor.backbone.model(tokens)[:, -1]
    narrow = hidden @ predictor.reduce.weight.T + predictor.reduce.bias
    wide = narrow @ predictor.expand.weight.T + predictor.expand.bias
    assert_same(predictor(tokens), wide.reshape(1, L, F))


PREDICTORS = {family: tiny_predictor(family) for family in ("llama", "gemma3_text")}


@pytest.mark.parametrize("family", PREDICTORS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    extra=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_padding_and_batching_do_not_change_scores(family, lengths, extra, seed):
    # 24 tokens are more than the sliding window of the tiny Gemma 3.
    predictor = PREDICTORS[family]
    tokens = tokens_of(len(lengths), max(lengths) + extra, seed=seed)
    batch = predictor(tokens, mx.array(lengths))
    for row, length in enumerate(lengths):
        assert_same(batch[row], predictor(tokens[row : row + 1, :length])[0])


def test_same_tokens_give_the_same_scores():
    tokens, lengths = tokens_of(3, 7), mx.array([7, 2, 5])
    first = tiny_predictor()(tokens, lengths)
    again = tiny_predictor()(tokens, lengths)
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first[0], tiny_predictor()(tokens_of(1, 7, seed=1))[0])


def test_scores_differ_from_the_bias_in_at_most_rank_dimensions():
    predictor = tiny_predictor()
    scores = predictor(tokens_of(40, 4)) - predictor.expand.bias.reshape(L, F)
    rank = np.linalg.matrix_rank(np.array(scores).reshape(40, -1), tol=1e-3)
    assert rank == RANK


def squared_error(predictor, tokens, lengths):
    return mx.mean((predictor(tokens, lengths) - 1) ** 2)


def test_gradient_reaches_head_and_every_backbone_layer():
    predictor = tiny_predictor()
    step = nn.value_and_grad(predictor, squared_error)
    _, gradients = step(predictor, tokens_of(2, 6), mx.array([6, 3]))
    silent = {k for k, v in tree_flatten(gradients) if mx.abs(v).max().item() == 0}
    assert silent == {"backbone.lm_head.weight"}  # predicts words; scores need none


def test_gradient_matches_central_differences():
    predictor, inputs = tiny_predictor(), (tokens_of(2, 6), mx.array([6, 3]))
    _, gradients = nn.value_and_grad(predictor, squared_error)(predictor, *inputs)
    norm = predictor.backbone.model.norm
    gradient = np.array(gradients["backbone"]["model"]["norm"]["weight"])
    direction = mx.array(np.sign(gradient))
    weight, step = norm.weight, 1e-2
    norm.weight = weight + step * direction
    above = squared_error(predictor, *inputs).item()
    norm.weight = weight - step * direction
    below = squared_error(predictor, *inputs).item()
    assert (above - below) / (2 * step) == pytest.approx(np.abs(gradient).sum(), 1e-2)


def test_compiled_scores_are_the_same():
    predictor, inputs = tiny_predictor(), (tokens_of(2, 6), mx.array([6, 3]))
    compiled = mx.compile(predictor.__call__, inputs=predictor.state)
    assert_same(compiled(*inputs), predictor(*inputs))


def test_another_process_loads_bit_identical_scores(tmp_path):
    predictor, tokens = tiny_predictor("qwen3"), tokens_of(2, 6)
    predictor.save(tmp_path / "predictor")
    code = (
        "import sys, mlx.core as mx\n"
        "from ifp_mlx.selection.predictor import SparsityPredictor\n"
        "predictor = SparsityPredictor.load(sys.argv[1])\n"
        "assert predictor.tokenizer is None and not predictor.training\n"
        "tokens = mx.load(sys.argv[2])['tokens']\n"
        "mx.save_safetensors(sys.argv[3], {'scores': predictor(tokens)})\n"
    )
    asked, told = tmp_path / "asked.safetensors", tmp_path / "told.safetensors"
    mx.save_safetensors(str(asked), {"tokens": tokens})
    arguments = [str(tmp_path / "predictor"), str(asked), str(told)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert mx.array_equal(mx.load(str(told))["scores"], predictor(tokens))


def test_saved_folder_is_an_ordinary_model_with_its_own_tokenizer(tmp_path):
    from mlx_lm.utils import load, load_tokenizer

    write_tokenizer(tmp_path)
    predictor = tiny_predictor(tokenizer=load_tokenizer(tmp_path))
    predictor.save(tmp_path / "predictor")
    model, tokenizer = load(str(tmp_path / "predictor"))
    tokens = mx.array([tokenizer.encode("Translate into French.")])
    assert mx.array_equal(model(tokens), predictor.backbone(tokens))

    loaded = SparsityPredictor.load(tmp_path / "predictor")
    assert loaded.tokenizer.encode("Translate into French.") == tokens[0].tolist()
    loaded.write(tmp_path / "larger" / "predictor")  # as part of a checkpoint
    again = SparsityPredictor.load(tmp_path / "larger" / "predictor")
    assert mx.array_equal(again(tokens), predictor(tokens))


def test_quantised_backbone_survives_saving(tmp_path):
    from mlx_lm.utils import quantize_model

    backbone, config = quantize_model(tiny_model("llama"), tiny_config("llama"), 32, 8)
    predictor = SparsityPredictor(backbone, L, F, config=config)
    predictor.save(tmp_path / "predictor")
    loaded = SparsityPredictor.load(tmp_path / "predictor")
    assert isinstance(loaded.backbone.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert mx.array_equal(loaded(tokens_of(1, 5)), predictor(tokens_of(1, 5)))


def test_saving_needs_a_config_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="without config="):
        tiny_predictor(config=None).save(tmp_path / "predictor")
    assert not list(tmp_path.iterdir())


def test_saving_does_not_replace_a_folder(tmp_path):
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        tiny_predictor().save(tmp_path)


def test_impossible_sizes_and_shapes_are_refused_with_their_values():
    with pytest.raises(ValueError, match="layers=0, channels=48, rank=8"):
        SparsityPredictor(tiny_model("llama"), 0, F, 8)
    predictor = tiny_predictor()
    with pytest.raises(ValueError, match=r"\[B, T\].*\(5,\)"):
        predictor(tokens_of(5))
    with pytest.raises(ValueError, match=r"not empty; got \(1, 0\)"):
        predictor(mx.zeros((1, 0), mx.int32))
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(3,\)"):
        predictor(tokens_of(2, 5), mx.array([5, 5, 5]))


def test_backbone_without_hidden_states_is_refused_by_name():
    class Mute(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"Mute cannot feed a predictor"):
        SparsityPredictor(Mute(), L, F)


@pytest.fixture
def folder(tmp_path):
    tiny_predictor().save(tmp_path / "predictor")
    return tmp_path / "predictor"


def rewrite_head(folder, sizes=None, **weights):
    path = str(folder / "head.safetensors")
    head, metadata = mx.load(path, return_metadata=True)
    head |= {name.replace("_", "."): value for name, value in weights.items()}
    mx.eval(head)
    head = {name: value for name, value in head.items() if value.size}
    mx.save_safetensors(path, head, metadata if sizes is None else sizes)


def test_missing_head_or_model_is_named(folder):
    (folder / "head.safetensors").rename(folder / "lost")
    with pytest.raises(FileNotFoundError, match=r"head\.safetensors is missing"):
        SparsityPredictor.load(folder)
    (folder / "lost").rename(folder / "head.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        SparsityPredictor.load(folder)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"layers": "5", "channels": "48"}, r"\(192, 8\).*5 layers of 48.*\(240, 8\)"),
        ({"layers": "4", "channels": "many"}, "'many'"),
        ({"layers": "4"}, "'channels'"),
        ({"layers": "0", "channels": "48"}, "layers=0"),
    ],
)
def test_wrong_metadata_is_refused_with_its_values(folder, sizes, words):
    rewrite_head(folder, sizes)
    with pytest.raises(ValueError, match=words):
        SparsityPredictor.load(folder)


@pytest.mark.parametrize(
    "weights, words",
    [
        ({"reduce_weight": mx.zeros((8, 33))}, r"\(8, 33\).*width 32.*\(8, 32\)"),
        ({"expand_bias": mx.zeros(7)}, r"\(7,\).*\(192,\)"),
        ({"reduce_weight": mx.zeros(0)}, r"'reduce\.weight': \(1, 32\)"),
        ({"extra": mx.zeros(3)}, r"'extra': \(3,\)"),
    ],
)
def test_head_that_does_not_fit_is_refused_with_its_shapes(folder, weights, words):
    rewrite_head(folder, **weights)
    with pytest.raises(ValueError, match=words):
        SparsityPredictor.load(folder)


def test_damaged_head_is_refused_in_one_sentence(folder):
    (folder / "head.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors lacks a head"):
        SparsityPredictor.load(folder)
