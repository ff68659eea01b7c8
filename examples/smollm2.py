"""SmolLM2-135M-Instruct: fetched, converted, and asked with part of its channels."""

from fetch import fetch

from ifp_mlx import load, stream_generate

QUESTIONS = ("What is the capital of France?", "Name three primary colors.")

model, tokenizer = load(fetch("smollm2"))
for question in QUESTIONS:
    for keep in (1.0, 0.9):  # auto would keep all of so small a model
        print(f"\n[keep {keep}] {question}")
        for r in stream_generate(model, tokenizer, question, keep=keep, max_tokens=60):
            print(r.text, end="", flush=True)
        share, speed = r.selection.share, r.generation_tps
        print(f"\n({share:.0%} of the FFN channels, {speed:.1f} tokens/s)")
