"""The paper's Table 3 beside what `ifp_mlx.plan`'s model predicts for its GPU.

    python -m examples.benchmarks.plan_paper [--write]

Shapes are the paper's (Table 4) and Llama 3.1 8B's; the GPU is its RTX A6000; 4,000
tokens in, 100 out, 4 answers per question, in half precision. The paper keeps all
weights in the GPU's memory, so its load is a copy. `--write` puts the table into
examples/guides/plan.md.
"""

import argparse
from pathlib import Path

from examples.benchmarks.pages import fill
from ifp_mlx.evaluation.tables import markdown
from ifp_mlx.model.footprint import Footprint, model_of_config
from ifp_mlx.planning.devices import find
from ifp_mlx.planning.roofline import Job, Work, predict, predictor_seconds
from ifp_mlx.slicing.plan import plan_of

PAGE = Path(__file__).parents[1] / "guides" / "plan.md"
JOB = Job(prompt_tokens=4000, max_tokens=100, instruction_tokens=4000, samples=4)

OWN = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 56,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128000,  # not stated in the paper
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA = OWN | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
PREDICTOR_WEIGHTS, PREDICTOR_LAYERS = 302_000_000, 24  # the layers are assumed

# Row → config, kept channels, and the paper's seconds: select, load, prefill, decode.
ROWS = {
    "9B, dense": (OWN, 24576, (None, None, 0.846, 7.16)),
    "3B, dense": (OWN, 6656, (None, None, 0.356, 5.68)),
    "9B → 3B, IFP": (OWN, 6656, (0.070, 0.043, 0.358, 5.58)),
    "Llama 8B, dense": (LLAMA, 14336, (None, None, 0.702, 5.47)),
    "8B cut to 3B": (LLAMA, 1536, (None, None, 0.317, 3.52)),
    "8B → 3B, IFP": (LLAMA, 1536, (0.070, 0.016, 0.315, 3.53)),
}


def rows() -> list[list[str]]:
    """Return the table's cells: what was predicted / what the paper measured."""
    device, table = find("rtx-a6000"), []
    for name, (config, kept, measured) in ROWS.items():
        dense = model_of_config(config)
        plan = plan_of(dense, config)
        footprint, work = Footprint.of_module(dense, plan), Work.of(dense, plan)
        sizes, select, copied = [kept] * footprint.layers, 0.0, 0
        if measured[0] is not None:
            head = 128 * footprint.layers * footprint.channels
            select = predictor_seconds(
                device,
                PREDICTOR_WEIGHTS,
                2 * (PREDICTOR_WEIGHTS + head),
                PREDICTOR_LAYERS,
                JOB.instruction_tokens,
            )
            copied = footprint.channel_bytes(sizes)
        times = predict(
            device, work, footprint, sizes, JOB, select=select, loaded=copied
        )
        found = (times.select, times.load_warm, times.prefill, times.decode)
        cells = [
            "" if there is None else f"{here:.3f} / {there:.3f}"
            for here, there in zip(found, measured, strict=True)
        ]
        ttft = sum(there or 0.0 for there in measured[:3])
        cells.insert(3, f"{times.ttft(warm=True):.3f} / {ttft:.3f}")
        table.append([name, *cells])
    return table


def main() -> None:
    """Print the comparison, or write it into the page."""
    parser = argparse.ArgumentParser(description="Hold the plan against the paper.")
    parser.add_argument("--write", action="store_true", help="into the guide plan.md")
    args = parser.parse_args()
    head = ["predicted / paper, s", "select", "load", "prefill", "TTFT", "decode"]
    text = markdown(head, rows())
    if args.write:
        fill(PAGE, {"paper": text})
    print(text)


if __name__ == "__main__":
    main()
