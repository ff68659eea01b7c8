"""Write answers.md: five questions to SmolLM2 at three budgets.

python -m examples.benchmarks.answers.answers
"""

from pathlib import Path

from examples.fetch import fetch
from ifp_mlx import generate, load

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a Python function that adds two numbers.",
    "Name three primary colors.",
    "Tell me a short story about a dog and the sea.",
)
KEEPS = (1.0, 0.75, 0.5)
OPTIONS = {"selector": "activation", "max_tokens": 80}
HEAD = """# What SmolLM2-135M-Instruct answers with part of its channels

Written by `python -m examples.benchmarks.answers.answers`: greedy decoding, 80 tokens at
most, the default selection of that time (activation over the prompt, layer 0 whole, dropped
channels made up for by the prompt), nothing trained or chosen by hand. `keep` is the kept
share of the FFN channels. The weights come from a 4-bit GGUF file. At 0.5 a model this
small is damaged without further training; larger models can lose more, but none was
measured here. Answers that can be checked are counted in
[checked_answers.md](checked_answers.md).
"""


def main() -> None:
    model, tokenizer = load(fetch("smollm2"))
    parts = [HEAD]
    for question in QUESTIONS:
        parts.append(f"## {question}\n")
        for keep in KEEPS:
            text = generate(model, tokenizer, question, keep=keep, **OPTIONS)
            quoted = "\n".join(
                f"> {line}".rstrip() for line in text.strip().split("\n")
            )
            parts.append(f"**keep {keep}**\n\n{quoted}\n")
    Path(__file__).with_name("answers.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
