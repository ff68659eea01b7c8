"""Write the selected channels as a folder of their own, and let mlx_lm answer from it.

    python examples/compact_folder.py [MODEL]

The folder is an ordinary model with a narrower FFN: mlx_lm, LM Studio and others open it
without knowing how it was made. Expect fewer bytes, and the answer Allemagne.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import mlx_lm

from ifp_mlx import load

QUESTION = "What is Germany called in French?"

whole, _ = load(*sys.argv[1:])
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "compact"
    command = [sys.executable, "-m", "ifp_mlx.compact", "--model", str(whole.path)]
    command += ["--instruction", QUESTION, "--mlx-path", str(out)]
    command += [] if whole.predictor else ["--keep", "0.75"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for path in (whole.path, out):
        size = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
        print(f"{path.name}: {size / 1e6:.1f} MB of weights")

    model, tokenizer = mlx_lm.load(str(out))  # without ifp_mlx from here on
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    print(QUESTION, mlx_lm.generate(model, tokenizer, prompt, max_tokens=32))
