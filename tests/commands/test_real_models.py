"""SmolLM2-135M-Instruct and Gemma-3-270m, as their registry packages carry them."""

import gc
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from conftest import fetch, relative_error, thinned
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ifp_mlx import Selection, generate, load, stream_generate
from ifp_mlx.model.export import Quantisation, write_compact
from ifp_mlx.selection.prompts import as_messages, tokenize
from ifp_mlx.slicing.masked import mask_model, set_masks
from ifp_mlx.slicing.plan import plan_of
from ifp_mlx.training.estimate import estimate
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.run import run

pytestmark = pytest.mark.real
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = {
    "smollm2": "What is the capital of France?",
    "gemma3": "The capital of France is",
}


@pytest.fixture(
    scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.long)]
)
def opened(request):
    """Return a name, the model and its tokenizer."""
    return request.param, *load(fetch(request.param))


@pytest.fixture(scope="module")
def smollm2():
    return load(fetch("smollm2"))


def test_keeping_everything_is_mlx_lms_own_model(opened):
    name, model, tokenizer = opened
    stock, stock_tokenizer = mlx_lm.load(str(model.path))
    everything = model.compact(model.select(PROMPTS[name], keep=1.0))
    tokens = tokenize(tokenizer, as_messages(PROMPTS[name]))
    logits = stock(mx.array([tokens]))
    assert relative_error(everything(mx.array([tokens])), logits) <= 1e-5
    expected = mlx_lm.generate(stock, stock_tokenizer, tokens, max_tokens=8)
    assert generate(model, tokenizer, PROMPTS[name], keep=1.0, max_tokens=8) == expected


CODE = "What is the code word?", "Marzipan seven."


def trained_adapter(folder, path):
    """Teach SmolLM2 a code word: a LoRA of rank 4 on some layers, in a few steps; with
    fewer two spellings of it are as likely.
    """
    model, tokenizer = mlx_lm.load(str(path))
    numbers = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    numbers["keys"] = ["self_attn.q_proj", "self_attn.v_proj"]
    numbers["keys"] += ["mlp.up_proj", "mlp.down_proj"]
    mx.random.seed(0)
    model.freeze()
    linear_to_lora_layers(model, 4, numbers)
    tokens = tokenize(tokenizer, as_messages(CODE[0]))
    answer = [*tokenizer.encode(CODE[1]), tokenizer.eos_token_id]
    inputs = mx.array([tokens + answer])

    def loss(model):
        logits = model(inputs[:, :-1])[:, len(tokens) - 1 :]
        return nn.losses.cross_entropy(logits, inputs[:, len(tokens) :]).mean()

    step, optimizer = nn.value_and_grad(model, loss), optim.Adam(2e-3)
    for _ in range(12):
        optimizer.update(model, step(model)[1])
        mx.eval(model.parameters(), optimizer.state)
    weights = tree_flatten(model.trainable_parameters(), destination={})
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": numbers}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.long
def test_half_of_an_adapted_model_knows_what_the_adapter_has_taught(smollm2, tmp_path):
    base, _ = smollm2
    lora = trained_adapter(tmp_path / "lora", base.path)
    adapted, tokenizer = load(base.path, lora)
    stock, _ = mlx_lm.load(str(base.path), adapter_path=str(lora))
    tokens = tokenize(tokenizer, as_messages(CODE[0]))
    expected = mlx_lm.generate(stock, tokenizer, tokens, max_tokens=10)
    found = generate(adapted, tokenizer, CODE[0], keep=1.0, max_tokens=10)
    assert found == expected and expected.startswith("Marzip")
    how = {"keep": 0.5, "selector": "activation", "compensate": False}
    half = [
        [*stream_generate(model, tokenizer, CODE[0], max_tokens=5, **how)]
        for model in (adapted, base)
    ]
    texts = ["".join(step.text for step in steps) for steps in half]
    assert texts[0].startswith("Marzip") and "Marzip" not in texts[1]
    mask = half[0][-1].selection
    assert mask.identity != half[1][-1].selection.identity
    with pytest.raises(ValueError, match="was made with the adapter"):
        base.compact(mask)


def test_real_slices_equal_real_masks(opened):
    name, model, tokenizer = opened
    tokens = mx.array([tokenize(tokenizer, as_messages(PROMPTS[name]))])
    for allocation in ("uniform", "first-layer"):
        selection = model.select(PROMPTS[name], keep=0.5, allocation=allocation)
        masked = model.dense()
        set_masks(mask_model(masked, plan_of(masked)), selection.mask())
        assert relative_error(model.compact(selection)(tokens), masked(tokens)) <= 1e-5


def test_three_quarters_of_smollm2_still_know_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    text = generate(model, tokenizer, PROMPTS["smollm2"], keep=0.75, max_tokens=12)
    assert "Paris" in text


@pytest.mark.long
def test_the_same_instruction_gives_the_same_mask_id_in_another_process(
    smollm2, tmp_path
):
    model, tokenizer = smollm2
    prompt, mask = PROMPTS["smollm2"], tmp_path / "mask.safetensors"
    command = [sys.executable, "-m", "ifp_mlx.generate", "--model", model.path]
    command += ["--prompt", prompt, "--keep", "0.75", "-m", "4", "--json"]
    run = subprocess.run(
        [*command, "--save-mask", mask], capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout.splitlines()[-1])
    step = next(stream_generate(model, tokenizer, prompt, keep=0.75, max_tokens=1))
    assert report["selection"]["mask_id"] == step.selection.mask_id
    assert Selection.load(mask).mask_id == step.selection.mask_id


@pytest.mark.parametrize("allocation", thinned(["uniform", "first-layer"], 2))
def test_a_compact_smollm2_in_stock_mlx_lm(
    smollm2, tmp_path, allocation, monkeypatch, capsys
):
    model, tokenizer = smollm2
    tokens = mx.array([tokenize(tokenizer, as_messages(PROMPTS["smollm2"]))])
    selection = model.select(PROMPTS["smollm2"], keep=0.75, allocation=allocation)
    out = write_compact(model, selection, tmp_path / "compact")
    command = ["mlx_lm.generate", "--model", str(out), "--verbose", "F"]
    command += ["--prompt", PROMPTS["smollm2"], "-m", "8"]
    monkeypatch.setattr(sys, "argv", command)
    import_module("mlx_lm.generate").main()
    assert "Paris" in capsys.readouterr().out
    stock, _ = mlx_lm.load(str(out))
    assert relative_error(stock(tokens), model.compact(selection)(tokens)) <= 1e-5


@pytest.mark.long
def test_a_quantised_compact_smollm2_in_stock_mlx_lm(smollm2, tmp_path):
    model, tokenizer = smollm2
    selection = model.select(PROMPTS["smollm2"], keep=0.75, allocation="uniform")
    how = Quantisation(bits=8, group_size=64)
    out = write_compact(model, selection, tmp_path / "compact", quantisation=how)
    stock, stock_tokenizer = mlx_lm.load(str(out))
    tokens = tokenize(tokenizer, as_messages(PROMPTS["smollm2"]))
    assert "Paris" in mlx_lm.generate(stock, stock_tokenizer, tokens, max_tokens=8)


@pytest.mark.torch
def test_a_compact_smollm2_in_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    selection = model.select(PROMPTS["smollm2"], keep=0.75, allocation="uniform")
    out = write_compact(model, selection, tmp_path / "compact")
    tokens = tokenize(tokenizer, as_messages(PROMPTS["smollm2"]))
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = mx.array(other(torch.tensor([tokens])).logits.numpy())
    assert relative_error(logits, model.compact(selection)(mx.array([tokens]))) <= 1e-3
    chat = [{"role": "user", "content": PROMPTS["smollm2"]}]
    theirs = AutoTokenizer.from_pretrained(out)
    ids = theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert ids == tokens


WAYS = {"lora": {"train": "lora"}, "repeated": {"grad_checkpoint": True}}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_training_is_within_a_fifth_of_the_memory_that_it_takes(
    tmp_path, way
):
    rows = [
        {
            "prompt": f"Repeat the word number {n}, and so on",
            "completion": "so on " * 40,
        }
        for n in range(8)
    ]
    for name in ("train", "valid"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = TrainConfig(
        model=str(fetch("smollm2")), data=str(tmp_path), output=str(tmp_path / "run"),
        keep=0.5, dtype="float32", steps=2, batch_size=4, warm_start=8, warm_steps=1,
        watch="off", compile=False, save_every=1000, eval_batches=1, **WAYS[way],
    )  # fmt: skip
    promised = estimate(config).memory_bytes
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(config, lambda line: None)
    assert mx.get_peak_memory() - before == pytest.approx(promised, rel=0.2)
