"""Lay the channels out on disk, so that a question reads only those that it needs.

    python examples/channel_store.py [MODEL]

In a plain folder a channel lies in three places, and the whole file is read; in a store
it is one record. A store takes the place of a folder everywhere. Expect Allemagne from
both; the question wants a quarter of the channels' bytes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ifp_mlx import generate, load

QUESTION = "What is Germany called in French?"

model, tokenizer = load(*sys.argv[1:])
keep = None if model.predictor else 0.75  # a trained model has its own keep
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "store"
    command = [sys.executable, "-m", "ifp_mlx.channel_store", "--json"]
    command += ["--model", str(model.path), "--output", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    record_bytes = json.loads(done.stdout)["record_bytes"]  # of a channel, by layer

    store, _ = load(path)
    selection = store.select(QUESTION, keep=keep)
    there = sum(record_bytes) * store.channels
    wanted = sum(k * b for k, b in zip(selection.sizes, record_bytes, strict=True))
    print(f"wanted: {wanted} of {there} bytes of channels")
    for name, source in (("folder", model), ("store", store)):
        text = generate(source, tokenizer, QUESTION, selection=selection, max_tokens=32)
        print(f"from the {name}: {text}")
