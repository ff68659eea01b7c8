"""What one token adds to the text, and how it is shown."""

import json

import pytest
from conftest import write_folder

from ifp_mlx import load
from ifp_mlx.engine.spelling import bytes_of, spelled

TEXT = " Hello, naïve 🎉 日本"


def test_the_bytes_of_byte_level_tokens_make_the_text(tmp_path):
    tokenizer = load(write_folder(tmp_path / "model"))[1]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = [bytes_of(tokenizer, token) for token in tokens]
    assert b"".join(pieces).decode() == TEXT and {len(piece) for piece in pieces} == {1}
    assert bytes_of(tokenizer, 258) == b"<|im_end|>"


def test_the_bytes_of_sentencepiece_tokens_make_the_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers

    folder = write_folder(tmp_path / "model", vocab_size=300)
    vocab = {"<unk>": 0} | {f"<0x{n:02X}>": n + 1 for n in range(256)}
    vocab |= {"▁": 257, "H": 258, "▁H": 259}
    model = models.BPE(vocab=vocab, merges=[("▁", "H")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(folder)[1]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = [bytes_of(tokenizer, token) for token in tokens]
    assert pieces[0] == b" H" and b"".join(pieces).decode() == TEXT


@pytest.mark.parametrize(
    ("content", "text"), [(b" H", " H"), (b"\xf0\x9f", "bytes:\\xf0\\x9f")]
)
def test_a_part_of_a_character_is_shown_by_its_bytes(content, text):
    assert spelled(content) == text
