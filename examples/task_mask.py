"""Choose the channels of a task once, keep them in a file, and use them again.

    python examples/task_mask.py [MODEL]

One question about French names chooses the channels for all of them. Expect Allemagne
and Brésil, and a wrong answer to the last question: it belongs to another task, which
needs other channels. To choose by many examples, see `python -m ifp_mlx.tasks make
--help`.
"""

import sys
import tempfile
from pathlib import Path

from ifp_mlx import Selection, generate, load

QUESTIONS = (
    "What is Germany called in French?",
    "What is the French word for Brazil?",
    "Tell me the currency code of Japan.",
)

model, tokenizer = load(*sys.argv[1:])
keep = None if model.predictor else 0.75  # a trained model has its own keep
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "french.safetensors"
    model.select("What is Italy called in French?", keep=keep).save(file)
    task = Selection.load(file)  # today, or in another process next week
    print(f"{file.name}: {file.stat().st_size} bytes, mask {task.mask_id}")

for question in QUESTIONS:
    answer = generate(model, tokenizer, question, selection=task, max_tokens=32)
    print(f"{question} {answer}")
