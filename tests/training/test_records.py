"""Bad training data is refused by file and line; no example sees what it is to learn."""

import json

import numpy as np
import pytest
from conftest import write_folder
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx import load
from ifp_mlx.training.records import Reader

GOOD = {"prompt": "turn alpha", "completion": "ahpla"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("model") / "m"))[1]


BAD = {
    "is empty": b"",
    "is not UTF-8": b'{"text": "\xff"}',
    "is not JSON": b'{"text": ',
    "is not JSON (maximum recursion": b"[" * 100_000,
    "is not an object": b"[1, 2]",
    "has the keys question, answer": b'{"question": "a", "answer": "b"}',
    "has messages that lack a role": b'{"messages": [{"content": "a"}]}',
    "has no answer": b'{"messages": [{"role": "user", "content": "a"}]}',
    "no assistant's message with text": b'{"prompt": "a", "completion": " "}',
    "has only text": b'{"text": "some words"}',
    "more than max_length 64": json.dumps(
        {"prompt": "a" * 70, "completion": "b"}
    ).encode(),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_refused_by_file_and_line(tokenizer, tmp_path, message):
    lines = [json.dumps(GOOD).encode(), BAD[message], json.dumps(GOOD).encode()]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    reader = Reader(tokenizer, "sft", max_length=64)
    with pytest.raises(ValueError) as caught:
        reader.read(str(tmp_path), "train")
    said = str(caught.value)
    assert "train.jsonl line 2 " in said and message in said and "--skip-bad" in said
    patient = Reader(tokenizer, "sft", max_length=64, skip_bad=True)
    assert [r.place[-6:] for r in patient.read(str(tmp_path), "train")] == [
        "line 1",
        "line 3",
    ]
    assert len(patient.skipped) == 1 and message in patient.skipped[0]


def test_a_file_of_bad_rows_only_is_refused_even_when_they_may_be_skipped(
    tokenizer, tmp_path
):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no good row in train"):
        Reader(tokenizer, "sft", skip_bad=True).read(str(tmp_path), "train")


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_with_nothing_to_learn_is_refused_where_it_stands(
    tokenizer, tmp_path, text
):
    lines = [json.dumps({"text": "two words"}), json.dumps({"text": text})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 2 has a text of less than two tokens"):
        Reader(tokenizer, "recover").read(str(tmp_path), "train")


def test_a_folder_without_training_data_is_said_so(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no train.jsonl"):
        Reader(tokenizer, "sft").read(str(tmp_path), "train")


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_an_answer_is_never_part_of_what_selects(tokenizer, prompt, completion):
    if not (prompt.strip() and completion.strip()):
        return
    reader = Reader(tokenizer, "sft")
    (record,) = reader.records({"prompt": prompt, "completion": completion})
    (other,) = reader.records({"prompt": prompt, "completion": completion + "!"})
    # Another answer to the same question selects the same.
    assert np.array_equal(record.instruction, other.instruction)
    first = int(record.loss.argmax())
    assert not np.array_equal(record.tokens[first:], other.tokens[first:])
    assert np.array_equal(record.tokens[:first], other.tokens[:first])


@given(st.integers(1, 12), st.integers(10, 80))
def test_a_chunk_never_selects_for_itself(tokenizer, chunk, length):
    reader = Reader(tokenizer, "pretrain", chunk=chunk, max_length=2 * chunk + 3)
    text = "".join(chr(97 + i % 26) for i in range(max(length, chunk + 1)))
    tokens = list(tokenizer.encode(text))
    learned = []
    for number, record in enumerate(reader.records({"text": text})):
        start = (number + 1) * chunk
        assert list(record.instruction) == tokens[start - chunk : start]
        assert list(record.tokens[record.loss]) == tokens[start : start + chunk]
        learned += list(record.tokens[record.loss])
    assert learned == tokens[chunk:]  # every later token once, the first chunk never
