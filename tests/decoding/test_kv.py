"""The KV cache is kept as mlx-lm keeps it, and what does not go together is said."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run_command, write_folder
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from mlx_lm.sample_utils import make_sampler

from ifp_mlx import load, stream_generate
from ifp_mlx.decoding.kv import KVOptions
from ifp_mlx.generate import main
from ifp_mlx.plan import main as plan
from ifp_mlx.slicing.stock import prefill as prefilled

LONG = "Hello, this is a text of some length."
HOW = [
    {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 70},
    {"max_kv_size": 20},
]
SHAPE = {"head_dim": 32, "hidden_size": 64}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv") / "tiny"
    return load(write_folder(folder, "qwen3", **SHAPE))


def tokens_of(steps):
    return [step.token for step in steps]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("prefill", ["compact", "dense"])
def test_keeping_everything_gives_mlx_lms_own_tokens(prefill, how, opened):
    if "max_kv_size" in how and prefill == "dense":
        pytest.skip("mlx-lm has no reading without the limit before one with it")
    model, tokenizer = opened
    tokens = model.instruction_tokens(LONG)
    read = len(tokens) - 1 if prefill == "dense" else 0
    told = {"max_tokens": 24, "sampler": make_sampler(1.0)}
    expected = []
    for some in (how, {}):
        mx.random.seed(5)
        cache = prefilled(model.dense(), tokens[:read]) if read else None
        steps = mlx_lm.stream_generate(
            model.dense(), tokenizer, tokens[read:], **some, **told, prompt_cache=cache
        )
        expected.append(tokens_of(steps))
    asked = {"keep": 1.0, "max_tokens": 24, "temp": 1.0, "seed": 5, "prefill": prefill}
    assert (
        tokens_of(stream_generate(model, tokenizer, LONG, **asked, **how))
        == expected[0]
    )
    assert expected[0] != expected[1] or how["kv_bits"] == 8


def test_llama_makes_its_own_cache_and_has_a_size_all_the_same(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "llama", "llama"))
    tokens = model.instruction_tokens(LONG)
    cache = [RotatingKVCache(20, keep=4) for _ in range(model.layers)]
    stock = mlx_lm.stream_generate(
        model.dense(), tokenizer, tokens, max_tokens=16, prompt_cache=cache
    )
    how = {"keep": 1.0, "max_tokens": 16, "max_kv_size": 20}
    found = stream_generate(model, tokenizer, LONG, **how)
    assert tokens_of(found) == tokens_of(stock)


def test_a_full_cache_goes_round_with_what_another_has_read():
    plain, round_ = KVCache(), RotatingKVCache(8, keep=4)
    for _ in range(2):
        keys = mx.random.normal((1, 2, 10, 4))
        plain.update_and_fetch(keys, keys)
    [held] = KVOptions(max_kv_size=8).holding([plain])
    round_.update_and_fetch(plain.keys[..., :20, :], plain.values[..., :20, :])
    one = mx.ones((1, 2, 1, 4))
    found, expected = held.update_and_fetch(one, one), round_.update_and_fetch(one, one)
    assert mx.array_equal(found[0], expected[0]) and found[0].shape[2] == 8


def test_a_footprint_follows_how_the_cache_is_kept(opened):
    model, _ = opened
    kept = model.footprint.keeping
    plain = model.footprint.kv_bytes(1000)
    packed = kept(KVOptions(8, 32, 100)).kv_bytes(1000)
    cache = QuantizedKVCache(32, 8)
    keys = mx.zeros((1, 2, 1000, 32))
    cache.update_and_fetch(keys, keys)
    rounded = cache.keys_and_values()
    nbytes = sum(part.nbytes for pair in rounded for part in pair)
    assert packed == model.layers * nbytes < plain
    assert kept(KVOptions(8, 32, 100)).kv_bytes(100) == model.footprint.kv_bytes(100)
    assert kept(KVOptions(max_kv_size=50)).kv_bytes(1000) == model.footprint.kv_bytes(
        50
    )


def test_plan_counts_the_bytes_of_a_quantised_cache(opened, capsys):
    given = ["--model", opened[0].path, "--keep", "0.5", "--json"]
    sizes = []
    for more in (
        [],
        ["--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0"],
    ):
        status, out, err = run_command(plan, capsys, *given, *more)
        assert status == 0, err
        sizes.append(json.loads(out.splitlines()[-1])["bytes"]["kv"])
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kv-bits", "3"), "kv_bits=3 is none of 2, 4, 8"),
        (("--kv-bits", "4", "--kv-group-size", "5"), "kv_group_size=5 is none of"),
        (
            ("--kv-bits", "4"),
            "kv_group_size=64 does not divide this model's head size, 32",
        ),
        (("--quantized-kv-start", "-1"), "quantized_kv_start=-1 must be at least 0"),
        (("--max-kv-size", "4"), "max_kv_size=4 must be more than"),
        (("--max-kv-size", "40", "--kv-bits", "4"), "do not go together"),
        (
            ("--max-kv-size", "40", "--check", "exact"),
            "max_kv_size=40 does not go with check",
        ),
        (
            ("--kv-bits", "4", "--kv-group-size", "32", "--check", "0.5"),
            "kv_bits=4 does not go with check=0.5",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(flags, words, opened, capsys):
    given = ["--model", opened[0].path, "-p", "Hi"]
    status, out, err = run_command(main, capsys, *given, *flags)
    assert (status, out) == (2, "") and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "how", [{"max_kv_size": 20}, {"kv_bits": 8, "kv_group_size": 32}]
)
def test_a_model_with_its_own_cache_is_told(how, tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "gemma", "gemma3_text", **SHAPE))
    with pytest.raises(ValueError, match=f"{min(how, key=len)}=.* type of model"):
        next(stream_generate(model, tokenizer, "Hi", **how))
