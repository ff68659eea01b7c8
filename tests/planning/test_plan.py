import json
from dataclasses import replace

import pytest
from conftest import (
    families,
    randomised,
    run_command,
    tiny_config,
    tiny_model,
    write_family,
    write_folder,
)
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ifp_mlx import plan
from ifp_mlx.model.checkpoint import load
from ifp_mlx.model.footprint import Footprint, model_bytes
from ifp_mlx.planning import devices, roofline, rows
from ifp_mlx.planning.devices import Device, Figure, Runtime
from ifp_mlx.planning.roofline import Job, Work
from ifp_mlx.selection.predictor import SparsityPredictor
from ifp_mlx.selection.request import SAFE_KEEP
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.slicing.stock import build

ROUND = Device(  # figures that can be multiplied by heart
    "round",
    "round figures",
    memory=Figure(1e6, "assumed", "test"),
    storage=Figure(1e5, "assumed", "test"),
    compute=Figure(1e7, "assumed", "test"),
    runtime=Runtime(0.5, 1.0, 0.5, 0.01, "test"),
)


def counted(family="llama", **changes):
    model = tiny_model(family, **changes)
    config = tiny_config(family, **changes)
    if config["tie_word_embeddings"]:
        names = (n for n, _ in tree_flatten(model.parameters()) if "lm_head" not in n)
        model.sanitize(dict.fromkeys(names))  # as loading a folder without one does
    slices = plan_of(model, config)
    return Work.of(model, slices), Footprint.of_module(model, slices)


def test_multiplications_are_counted_from_shapes():
    work, _ = counted()
    assert work.core == 3 * 32 * (32 + 16 + 16 + 32)  # q, k, v and o in 3 layers
    assert work.channel == 3 * 32
    assert work.head == 259 * 32 and work.lookup_bytes == 259 * 32 * 4
    assert work.attention == (2 * 32,) * 3
    assert work.per_token([64] * 3) == work.core + 3 * 64 * 96


def test_a_tied_embedding_is_the_output_layer_and_read_whole():
    work, footprint = counted("gemma3_text")
    assert work.head == 259 * 32 and work.lookup_bytes == 0
    sizes = [64] * 3
    job = Job(prompt_tokens=8, max_tokens=1)
    seconds = roofline.decode_seconds(ROUND, work, footprint, sizes, job)
    read = footprint.dense_bytes + footprint.kv_bytes(8)
    assert seconds == pytest.approx(read / 1e6 + 0.03)


def test_quantised_weights_are_as_many_multiplications():
    from mlx import nn

    model = tiny_model("llama")
    slices = plan_of(model)
    plain = Work.of(model, slices)
    nn.quantize(model, group_size=32, bits=4)
    assert replace(Work.of(model, slices), lookup_bytes=0) == replace(
        plain, lookup_bytes=0
    )


def test_prefill_takes_its_arithmetic_and_each_layers_start():
    work, footprint = counted()
    tokens, sizes = 100, [32] * 3
    pairs = 100 * 101 // 2
    products = tokens * work.per_token(sizes) + work.head + 3 * 64 * pairs
    found = roofline.forward_seconds(ROUND, work, footprint, sizes, tokens)
    assert found == pytest.approx(2 * products / (1e7 * 0.5) + 0.03)


def test_attention_in_a_window_grows_no_further():
    work, footprint = counted("gemma3_text")  # a window of 16 in two of three layers

    def seconds(tokens):
        linear = 2 * tokens * work.per_token([64] * 3) / 5e6
        whole = roofline.forward_seconds(ROUND, work, footprint, [64] * 3, tokens)
        return whole - linear

    wide = 64 * (1000 * 1001 / 2)
    narrow = 64 * (16 * 17 / 2 + 984 * 16)
    expected = 2 * (wide + 2 * narrow + work.head) / 5e6 + 0.03
    assert seconds(1000) == pytest.approx(expected)


def test_samples_share_the_weights_and_have_a_cache_each():
    work, footprint = counted()
    one, four = (
        roofline.decode_seconds(
            ROUND, work, footprint, [64] * 3, Job(100, 10, samples=samples)
        )
        for samples in (1, 4)
    )
    assert four - one == pytest.approx(10 * 3 * footprint.kv_bytes(105) / 1e6)


def test_loading_is_from_storage_cold_and_a_copy_warm():
    assert roofline.load_seconds(ROUND, 5e4, warm=False) == 0.5
    assert roofline.load_seconds(ROUND, 5e4, warm=True) == pytest.approx(0.2)
    resident = replace(ROUND, storage=None)
    assert roofline.load_seconds(resident, 5e4, warm=False) is None


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(list(devices.DEVICES)))
def test_fewer_channels_never_take_longer(one, other, name):
    work, footprint = COUNTED
    job = Job(512, 100)
    small, large = (
        roofline.predict(devices.DEVICES[name], work, footprint, [k] * 3, job)
        for k in sorted((one, other))
    )
    assert small.prefill <= large.prefill and small.decode <= large.decode
    assert small.load_warm <= large.load_warm
    assert small.ttft() <= large.ttft()


COUNTED = counted()


def mixture(name="qwen3_moe"):
    config = families()[name]
    model = randomised(build(config))
    slices = plan_of(model, config)
    return Work.of(model, slices), Footprint.of_module(model, slices)


def test_a_token_goes_through_the_experts_it_is_sent_to_alone():
    work, footprint = mixture()  # 8 experts, 2 a token; the first of 4 layers is dense
    expert, attention = 3 * 32 * 32, 4 * 32 * (32 + 16 + 16 + 32)
    assert work.core == attention + 3 * 32 * 64 + 3 * 32 * 8  # one FFN, three routers
    assert (work.channel, work.slots) == (expert, 2)
    for kept in (2, 4, 8):
        assert work.per_token([kept] * 3) == work.core + 3 * 2 * expert
        read = footprint.core_bytes + 2 * sum(footprint.layer_bytes)
        seconds = roofline.decode_seconds(ROUND, work, footprint, [kept] * 3, Job(9, 1))
        moved = read - work.lookup_bytes + footprint.kv_bytes(9)
        assert seconds == pytest.approx(moved / 1e6 + 0.04)


def test_many_tokens_go_through_all_experts_but_no_more():
    work, _ = mixture()
    assert work.used([4, 8], 1) == pytest.approx([2, 2])
    assert work.used([4, 8], 3) == pytest.approx([4 * (1 - 0.5**3), 8 * (1 - 0.75**3)])
    assert work.used([2, 4, 8], 1000) == pytest.approx([2, 4, 8])


def test_loading_a_mixture_reads_its_kept_experts(tmp_path):
    folder = write_family(tmp_path / "m", "deepseek_v3")  # has a shared expert
    subject = rows.open_subject(str(folder), channel_store=True)
    job = Job(8, 8, 8)
    few, many = (rows.times(subject, ROUND, [k] * 3, job).load for k in (2, 6))
    assert many - few == pytest.approx(4 * sum(subject.footprint.layer_bytes) / 1e5)


@pytest.mark.parametrize(
    ("name", "least", "step"),
    [("qwen3_moe", 2, 1), ("deepseek_v3, groups", 4, 2), ("gpt_oss", 2, 1)],
)
def test_a_keep_is_rounded_to_what_the_router_can_have(
    name, least, step, tmp_path, capsys
):
    folder = write_family(tmp_path / "m", name)
    arguments = ("--model", folder, "--keep", 0.1, 0.7, "--device", "m4", "--json")
    status, out, err = run_command(plan.main, capsys, *arguments)
    assert (status, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert (found["unit"], found["smallest"], found["granularity"]) == (
        "expert",
        least,
        step,
    )
    assert [row["target_size"] for row in found["rows"]] == [least, 6, 8]
    assert "experts" in out and "channel" not in out.splitlines()[0]
    model, _ = load(folder)
    for row in found["rows"]:
        model.select("Add.", selector="random", target_size=row["target_size"])
    with pytest.raises(ValueError, match=r"too few|no multiple"):
        model.select("Add.", selector="random", target_size=least - 1)


def test_a_mixture_that_does_not_fit_is_told_what_its_experts_need(tmp_path, capsys):
    folder = write_family(tmp_path / "m", "qwen3_moe")
    footprint = rows.open_subject(str(folder)).footprint
    memory = footprint.total_bytes([3] * 3, 64) / 1e9
    about = ("--model", folder, "--context-length", 64, "--memory-gb")
    status, out, _ = run_command(plan.main, capsys, *about, memory, "--keep", 0.49)
    assert status == 1 and "It does not fit at keep 0.49" in out
    assert "--target-size 3" in out
    status, out, _ = run_command(plan.main, capsys, *about, 1e-4)
    assert status == 1
    assert "for everything but the experts" in out and "for 2 experts a layer" in out


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization": {"group_size": 64, "bits": 4},
}


def test_a_large_mixture_can_be_planned_from_its_config_alone(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_30B))
    arguments = ("--model", file, "--device", "m4-pro", "--keep", 0.5, "--json")
    status, out, _ = run_command(plan.main, capsys, *arguments)
    assert status == 0
    found = json.loads(out.splitlines()[-1])
    half, whole = found["rows"]
    # 30.5e9 weights of 4 bits, and a scale and a bias of 16 bits for each 64
    assert whole["compact_bytes"] == pytest.approx(30.5e9 * 4.5 / 8, rel=0.01)
    experts = 48 * 64 * 3 * 2048 * 768
    assert whole["compact_bytes"] - half["compact_bytes"] == pytest.approx(
        experts * 4.5 / 8, rel=0.01
    )
    assert half["times"]["decode"] == pytest.approx(whole["times"]["decode"])
    assert half["times"]["load"] == whole["times"]["load"]  # of a plain folder


def test_the_command_says_what_fits(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    footprint = rows.open_subject(str(folder)).footprint
    half = footprint.total_bytes([32] * 3, 100)
    status, out, err = run_command(
        plan.main,
        capsys,
        *("--model", folder, "--memory-gb", half / 1e9, "--context-length", 100),
        *("--device", "m4", "--json"),
    )
    assert (status, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert found["largest_keep"] == 0.5 and found["fits"] is True
    assert "The largest that fits" in out and "--target-size 32 (keep 0.500)" in out
    assert [row["fits"] for row in found["rows"]] == [True, False]
    assert found["rows"][0]["total_bytes"] == half
    assert found["bytes"]["core"] == footprint.core_bytes
    assert sum(found["bytes"].values()) == footprint.total_bytes([64] * 3, 100)
    spent = found["rows"][0]["times"]
    total = spent["select"] + spent["load"] + spent["prefill"]
    assert spent["ttft"] == pytest.approx(total)
    assert "Predicted, not measured" in out and "vendor" in out


def test_without_a_limit_it_plans_half_three_quarters_and_all(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    status, out, _ = run_command(plan.main, capsys, "--model", folder, "--json")
    found = json.loads(out.splitlines()[-1])
    assert status == 0 and found["largest_keep"] is None
    assert [row["keep"] for row in found["rows"]] == [0.5, SAFE_KEEP, 1.0]
    assert "What these lose is not known" in out and "evaluate --card" in out
    whole = ("--model", folder, "--keep", 1)
    assert "is not known" not in run_command(plan.main, capsys, *whole)[1]


def test_what_does_not_fit_exits_with_status_1(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    status, out, err = run_command(
        plan.main, capsys, "--model", folder, "--memory-gb", 1e-5, "--json"
    )
    assert (status, err) == (1, "")
    assert "It does not fit" in out and "10.0 kB of memory are too few" in out
    assert json.loads(out.splitlines()[-1])["largest_keep"] is None


def test_a_keep_that_does_not_fit_is_told_the_largest_that_does(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    footprint = rows.open_subject(str(folder)).footprint
    memory = footprint.total_bytes([40] * 3, 4096)
    arguments = ("--model", folder, "--memory-gb", memory / 1e9, "--keep", 0.75)
    status, out, _ = run_command(plan.main, capsys, *arguments)
    assert status == 1 and "It does not fit at keep 0.75" in out
    assert "--target-size 40" in out
    status, out, _ = run_command(plan.main, capsys, *arguments, 0.5)
    assert status == 0  # one of the keeps that were asked for does


def test_a_config_alone_can_be_planned(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config("qwen3")))
    folder = write_folder(tmp_path / "m", "qwen3")
    status, out, _ = run_command(plan.main, capsys, "--model", file, "--json")
    assert status == 0
    found = json.loads(out.splitlines()[-1])
    whole = rows.open_subject(str(folder)).footprint.dense_bytes
    assert found["bytes"]["core"] + found["bytes"]["channels"] == whole / 2  # float16


def test_a_channel_store_is_read_in_part(tmp_path):
    folder = write_folder(tmp_path / "m")
    job = Job(8, 8, 8)
    plain, stored = (
        rows.open_subject(str(folder), channel_store=store) for store in (False, True)
    )
    times = [rows.times(subject, ROUND, [16] * 3, job) for subject in (plain, stored)]
    assert times[0].load == pytest.approx(plain.footprint.dense_bytes / 1e5)
    assert times[1].load == pytest.approx(plain.footprint.compact_bytes([16] * 3) / 1e5)


def test_a_predictor_is_timed_by_its_own_model(tmp_path):
    folder = write_folder(tmp_path / "m")
    config = tiny_config("llama", hidden_size=16)
    backbone = tiny_model("llama", hidden_size=16)
    SparsityPredictor(backbone, 3, 64, 4, config=config).save(folder / "predictor")
    subject = rows.open_subject(str(folder))
    weights, layers = subject.predictor
    assert layers == 3
    assert weights == 3 * 16 * (32 + 16 + 16 + 32) + 3 * 64 * 3 * 16
    assert subject.footprint.predictor_bytes > model_bytes(backbone)
    found = rows.times(subject, ROUND, [16] * 3, Job(8, 8, 100))
    assert found.select == pytest.approx(
        max(2 * weights * 100 / 5e6, subject.footprint.predictor_bytes / 1e6) + 0.03
    )
    dense = rows.times(subject, ROUND, [64] * 3, Job(8, 8, 100))
    assert dense.select == 0  # nothing is selected


def test_mistakes_are_one_line_and_exit_status_2(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    for arguments, sentence in (
        (("--model", folder, "--device", "m9"), "no device profile 'm9'"),
        (("--model", folder, "--memory-gb", 0), "--memory-gb 0.0 must be above 0"),
        (("--model", folder, "--context-length", 0), "--context-length 0 must be"),
        (("--model", folder, "--keep", 1.5), "keep=1.5 is not a share"),
        (("--model", tmp_path / "none"), "none is missing"),
    ):
        status, _, err = run_command(plan.main, capsys, *arguments)
        assert status == 2 and sentence in err and err.count("\n") == 1
