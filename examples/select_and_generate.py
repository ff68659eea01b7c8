"""Answer questions, each with only the channels that it needs.

    python examples/select_and_generate.py [MODEL]

Each question chooses its own channels and is answered by a model that has no others.
The first two ask for the same kind of thing and share most of their channels; the third
shares few with them. Expect Allemagne, Espagne and Norwegia.
"""

import sys

from ifp_mlx import generate, load

QUESTIONS = (
    "What is Germany called in French?",
    "What is Spain called in French?",
    "How do you say Norway in Polish?",
)

# MODEL is a folder or a hub id; without it, the small checkpoint inside the package.
model, tokenizer = load(*sys.argv[1:])
keep = None if model.predictor else 0.75  # a trained model has its own keep
first = None
for question in QUESTIONS:
    selection = model.select(question, keep=keep)
    mask = selection.mask() > 0  # [layers, channels]
    first = mask if first is None else first
    answer = generate(model, tokenizer, question, selection=selection, max_tokens=32)
    print(f"{question} {answer}")
    print(f"  kept: {int(mask.sum())} of {mask.size} channels", end=", ")
    print(f"{int((mask & first).sum())} of them as for the first question")
