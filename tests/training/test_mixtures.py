"""A mixture and its predictor learn together: what moves, what stays, what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import families, relative_error, run_command, write_family
from mlx.utils import tree_flatten
from test_train import bare

from ifp_mlx import Selection, load, train
from ifp_mlx.generate import main as answer
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.slicing.masked import mask_model
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.reading import scores
from ifp_mlx.slicing.shapes import at
from ifp_mlx.slicing.stock import build
from ifp_mlx.training import validation, warm_start
from ifp_mlx.training.batches import Batch
from ifp_mlx.training.maskers import Budget, PredictorMasker
from ifp_mlx.training.maskers import checkpoint_layers as recompute
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import train as descend
from ifp_mlx.training.step import Pair, Step, target_losses
from ifp_mlx.training.trainee import adapt, open_trainee, write_checkpoint

WORDS = ("alpha", "beta", "gamma", "delta")
ROWS = [
    {"prompt": f"{verb} {word}", "completion": word[::-1], "task": verb}
    for word in WORDS
    for verb in ("turn", "flip", "swap")
]
KEPT = Budget(4, 0.3, "binary")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("model") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), ROWS)


def write_rows(folder, rows):
    for name in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def command(folder, data, output, capsys, *options):
    return run_command(
        train.main, capsys, "--model", folder, "--data", data, "--output", output,
        "--steps", 3, "--batch-size", 4, "--lr", 0.01, "--json", "--log-every", 1,
        "--watch", "off", "--no-compile", "--warm-steps", 4, *options,
    )  # fmt: skip


def run(folder, data, output, capsys, *options):
    status, out, err = command(folder, data, output, capsys, *options)
    assert status == 0, err
    return json.loads(out), err


def weights(folder):
    return dict(tree_flatten(load(folder)[0].dense().parameters()))


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in after if not mx.array_equal(before[name], after[name])}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = [mx.array(rng.integers(0, 250, (4, n)).astype(np.int32)) for n in (6, 12)]
    return Batch(tokens[0], mx.array([6, 5, 4, 6]), tokens[1], mx.ones((4, 12)))


def mixture(folder, seed=3):
    """Return a model and a predictor of its own, its head random."""
    model = load(folder)[0].dense()
    plan = plan_of(model, families()["qwen3_moe"])
    small = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 259}
    predictor = SparsityPredictor(build(small | {"rms_norm_eps": 1e-6}), *plan.shape, 8)
    rng = np.random.default_rng(seed)
    flat = tree_flatten(predictor.parameters())
    drawn = [(n, rng.normal(0, 0.3, v.shape).astype(np.float32)) for n, v in flat]
    predictor.load_weights([(name, mx.array(value)) for name, value in drawn])
    mask_model(model, plan)
    return model, PredictorMasker(predictor)


def gradient(folder, *, checkpointed):
    pair = Pair(*mixture(folder))
    assert [router.channels for router in pair.inlets] == [8, 8, 8]
    if checkpointed:
        recompute(pair.llm)
    step = Step(pair, TrainConfig(), compiled=False)
    about = (KEPT.k, mx.array(KEPT.temperature), KEPT.gates, 1)
    return dict(tree_flatten(step._backward(list(batch()), None, None, *about)[1]))


def test_the_gradient_reaches_the_predictor_the_router_and_the_experts(folder):
    found = gradient(folder, checkpointed=False)
    assert all(mx.isfinite(value).all() for value in found.values())
    for name in ("reduce.weight", "expand.weight", "backbone.model.norm.weight"):
        assert float(mx.abs(found[f"masker.predictor.{name}"]).max()) > 0
    for name in ("gate.weight", "switch_mlp.up_proj.weight"):
        assert float(mx.abs(found[f"llm.model.layers.2.mlp.{name}"]).max()) > 0
    again = gradient(folder, checkpointed=True)
    name = "masker.predictor.reduce.weight"
    assert relative_error(again[name], found[name]) < 1e-5


def test_model_and_predictor_learn_together(folder):
    config = TrainConfig(
        steps=20, lr=0.01, log_every=1, compile=False, gates="binary", weight_decay=0.0
    )
    model, masker = mixture(folder)
    before = dict(tree_flatten(masker.parameters()))
    lines = descend(model, masker, lambda number: batch(), config)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["masker_grad_norm"] > 0 for line in lines)
    after = dict(tree_flatten(masker.parameters()))
    assert "predictor.expand.weight" in moved(before, after)


def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    config = TrainConfig(
        steps=6, lr=1e-2, save_every=2, log_every=1, compile=False, gates="binary"
    )
    whole = mixture(folder)
    lines = descend(*whole, batch, config, folder=tmp_path / "whole")

    def interrupted(number):
        if number == 5:
            raise KeyboardInterrupt
        return batch(number)

    with pytest.raises(KeyboardInterrupt):
        descend(*mixture(folder), interrupted, config, folder=tmp_path / "cut")
    again = mixture(folder, seed=9)  # not even the same start
    found = descend(*again, batch, config, folder=tmp_path / "cut")
    assert bare(found) == bare(lines)
    ends = [dict(tree_flatten(Pair(*pair).parameters())) for pair in (whole, again)]
    assert not moved(*ends)


def test_the_loss_with_hard_masks_is_that_of_the_compact_models(
    folder, data, tmp_path, capsys
):
    report, _ = run(folder, data, tmp_path / "run", capsys)
    assert report["sliced_error"] < 1e-5
    assert report["valid_loss"] == report["loss_binary"]
    assert report["overlap_chance"] == 0.5
    trained, _ = load(tmp_path / "run" / "model")
    assert trained.ifp.gates == "binary" and trained.ifp.target_size == 4
    model, masker = trained.dense(), PredictorMasker(trained.predictor)
    mask_model(model, trained.plan)
    one = batch()
    masked = validation.evaluate_loss(model, masker, [one], KEPT)
    losses = []
    for row in range(4):
        alone = Batch(*(a[row : row + 1] for a in one if a is not None))
        tokens = alone.instruction[0, : int(alone.lengths[0])].tolist()
        kept = trained.select(tokens)
        assert (kept.unit, kept.origin.selector) == ("expert", "predictor")
        assert kept.gates is None and kept.sizes == [4, 4, 4]
        logits = trained.compact(kept)(alone.tokens[:, :-1]).astype(mx.float32)
        losses.append(float(target_losses(logits, alone).mean()))
    assert masked == pytest.approx(np.mean(losses), rel=1e-5)


def test_generate_chooses_experts_by_the_trained_predictor(
    folder, data, tmp_path, capsys
):
    run(folder, data, tmp_path / "run", capsys, "--target-size", 3)
    given = ("--model", tmp_path / "run" / "model", "--prompt", "turn alpha", "-m", 2)
    status, out, err = run_command(answer, capsys, *given, "--json")
    assert status == 0, err
    said = json.loads(out.splitlines()[-1])["selection"]
    assert (said["selector"], said["unit"]) == ("predictor", "expert")
    assert (said["kept_channels"], said["total_channels"]) == (9, 24)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_frozen_router_keeps_its_bits_while_experts_learn(
    how, folder, data, tmp_path, capsys
):
    options = ("--train", how, "--freeze-router", "--lora-rank", 2)
    report, _ = run(folder, data, tmp_path / "run", capsys, *options)
    changed = moved(weights(folder), weights(tmp_path / "run" / "model"))
    assert any("switch_mlp" in name for name in changed)
    assert any("self_attn" in name for name in changed)
    assert not any(".gate." in name for name in changed)
    assert report["sliced_error"] < 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_router_and_experts_are_fused_into_what_is_written(name, tmp_path):
    folder = write_family(tmp_path / "model", name)
    config = TrainConfig(model=str(folder), train="lora", lora_rank=2)
    trainee, tokens = open_trainee(config), batch().tokens
    stock = trainee.model(tokens)
    adapt(trainee.model, trainee.plan, config)
    names = {n for n, _ in tree_flatten(trainee.model.trainable_parameters())}
    for part in ("gate_proj", "down_proj", "q_proj", trainee.plan.layers[0].inlet):
        assert any(f"{part}.lora_b" in n for n in names)
    grown = [(n, mx.full(at(trainee.model, n).shape, 0.01)) for n in names]
    trainee.model.load_weights(grown, strict=False)
    adapted = trainee.model(tokens)
    assert relative_error(stock, adapted) > 1e-3
    write_checkpoint(tmp_path / "out", trainee, None, None)
    written = load(tmp_path / "out")[0].dense()
    assert type(written) is type(build(families()[name]))
    assert relative_error(written(tokens), adapted) < 1e-5
    assert relative_error(trainee.model(tokens), adapted) < 1e-5


def test_ffn_training_leaves_attention_as_it_is(folder, data, tmp_path, capsys):
    run(folder, data, tmp_path / "run", capsys, "--train", "ffn")
    changed = moved(weights(folder), weights(tmp_path / "run" / "model"))
    assert any(".gate." in name for name in changed)
    assert not any("_proj" in name and "self_attn" in name for name in changed)


@pytest.mark.parametrize("options", [("--predictor", "new"), ("--stage", "pretrain")])
def test_other_ways_of_training_slice_as_they_are_masked(
    options, folder, tmp_path, capsys
):
    rows = ROWS
    if "pretrain" in options:
        rows = [{"text": f"{n} " + " ".join(WORDS) * 2} for n in range(8)]
        options = (*options, "--chunk", 16)
    data = write_rows(tmp_path, rows)
    report, _ = run(folder, data, tmp_path / "run", capsys, *options)
    assert report["sliced_error"] < 1e-5
    predictor = load(tmp_path / "run" / "model")[0].predictor
    names = {name for name, _ in tree_flatten(predictor.parameters())}
    assert any("switch_mlp" in name for name in names) != ("new" in options)


def test_a_learned_static_mask_is_a_mask_file_of_experts(
    folder, data, tmp_path, capsys
):
    run(folder, data, tmp_path / "run", capsys, "--masker", "static")
    mask = Selection.load(tmp_path / "run" / "mask.safetensors")
    model, _ = load(tmp_path / "run" / "model")
    assert mask.unit == "expert" and mask.gates is None and mask.sizes == [4, 4, 4]
    model.check_fits(mask)


def test_the_warm_start_sees_of_every_row_what_a_selection_by_it_would_see(folder):
    model = load(folder)[0].dense()
    plan, one = plan_of(model, families()["qwen3_moe"]), batch()
    ends = (11, 8, 3, 11)  # tokens before the last target
    learned = [[float(t <= end) for t in range(12)] for end in ends]
    one = one._replace(loss_mask=mx.array(learned))
    found = warm_start.expert_importance(plan, model, one)
    for row, end in enumerate(ends):
        alone = [one.tokens[row, : min(end + 1, 11)].tolist()]
        used = np.array(scores(model, plan, [alone]))
        expected = np.log(used + 0.1 * used.mean(axis=-1, keepdims=True))
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_recovery_brings_a_mask_of_experts_nearer_to_the_dense_model(
    data, tmp_path, capsys
):
    folder = write_family(
        tmp_path / "model", "deepseek_v3"
    )  # its router takes one mask
    mask = tmp_path / "mask.safetensors"
    load(folder)[0].select([5, 9], keep=0.5, selector="random").save(mask)
    options = ("--stage", "recover", "--mask-file", mask, "--steps", 12, "--lr", 1e-3)
    report, _ = run(folder, data, tmp_path / "run", capsys, *options)
    assert report["kl_after"] < 0.8 * report["kl_before"]
    assert load(tmp_path / "run" / "model")[0].channels == 4


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("qwen3_moe", ("--gates", "soft"), "experts have gates: binary"),
        ("qwen3_moe", ("--granularity", 2), "experts are chosen one by one"),
        ("qwen3_moe", ("--target-size", 1), "with 1 of its 8 experts has too few"),
        ("qwen3_moe", ("--target-size", 9), "between 1 and the 8 experts"),
        ("qwen3_moe", ("--shared", 5), "shared=5 must be between 0 and the 4 experts"),
        ("qwen3_moe", ("--train", "dora"), "use train: lora"),
        ("qwen3", ("--freeze-router",), "this model has no router"),
        ("qwen3", ("--balance-weight", 0.1), "balance_weight=0.1 is for mixtures"),
        ("qwen3_moe", ("--balance-weight", -1), "a number not below 0"),
        (
            "qwen3_moe",
            ("--balance-weight", 0.1, "--freeze-router"),
            "teaches the routers, which this run leaves as they are",
        ),
        (
            "deepseek_v3",
            ("--balance-weight", 0.1, "--masker", "dense"),
            "needs the logits of the routers, and MoEGate multiplies a bare weight",
        ),
        ("glm4_moe, groups", (), "chooses among 2 groups of experts"),
        ("glm4_moe, groups", ("--target-size", 3), "no multiple of the 2 groups"),
        (
            "deepseek_v3",
            (),
            "The router MoEGate of mlx_lm.models.deepseek_v3.DeepseekV3",
        ),
        ("deepseek_v3", ("--masker", "static"), "use masker: dense"),
        ("Klear", (), "KlearSparseMoeBlock does not take masks of several instruc"),
        (
            "qwen3_5_moe",
            (),
            "has no num_hidden_layers of its own); use --predictor new",
        ),
    ],
)
def test_what_a_mixture_cannot_have_is_refused_before_anything_is_written(
    name, options, said, data, tmp_path, capsys
):
    folder = write_family(tmp_path / "model", name)
    status, _, err = command(folder, data, tmp_path / "run", capsys, *options)
    assert status == 2 and said in err, err
    assert not (tmp_path / "run").exists()


def test_a_router_that_chooses_by_itself_is_trained_without_a_masker(
    data, tmp_path, capsys
):
    folder = write_family(tmp_path / "model", "deepseek_v3")
    run(folder, data, tmp_path / "run", capsys, "--masker", "dense")
    before, after = weights(folder), weights(tmp_path / "run" / "model")
    assert any(".gate.weight" in name for name in moved(before, after))


def test_a_run_whose_experts_are_always_the_same_is_stopped(
    folder, data, tmp_path, capsys
):
    options = ("--shared", 4, "--watch", "stop", "--eval-every", 1)
    status, _, err = command(folder, data, tmp_path / "run", capsys, *options)
    assert status == 2 and "of what they keep, random masks 0.500" in err
    assert "channels" not in err


def test_masks_straight_through_are_exactly_one_and_zero():
    scores = mx.random.normal((3, 2, 8), key=mx.random.key(0))
    masks = KEPT.masks(scores, KEPT.training_form)
    assert {*np.array(masks).ravel().tolist()} == {0.0, 1.0}
