"""Gemma-3-270m (base): fetched, converted, and continued with part of its channels.

A base model continues a text instead of answering, and this one has no chat template.
"""

from fetch import fetch

from ifp_mlx import load, stream_generate

TEXTS = ("The capital of France is", "Water boils at")

model, tokenizer = load(fetch("gemma3"))
for text in TEXTS:
    for keep in (1.0, 0.9):  # auto would keep all of so small a model
        print(f"\n[keep {keep}] {text}", end="")
        for r in stream_generate(model, tokenizer, text, keep=keep, max_tokens=24):
            print(r.text, end="", flush=True)
        share, speed = r.selection.share, r.generation_tps
        print(f"\n({share:.0%} of the FFN channels, {speed:.1f} tokens/s)")
