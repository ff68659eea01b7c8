"""Rebuilt tokenizers read text as their originals do."""

import json
import unicodedata

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, pre_tokenizers

from ifp_mlx.convert.gguf.vocabulary import (
    CONTROL,
    NORMAL,
    PROBES,
    USER_DEFINED,
    byte_level_bpe,
    unpack_sentencepiece,
    write_tokenizer,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and over the other dog too",
    "def over(other):\n    return the(quick) + 12345",
    "Der schnelle Fuchs springt über den Hund. Ελληνικά, Русский, 日本語.",
    "pack my box with five dozen liquor jugs;  how vexingly quick they jump",
]
TEXTS = [*CORPUS, *PROBES, "", " ", "▁", "x" * 50, "the the  the   the", "a<b>c <b> d"]


@pytest.fixture
def train(tmp_path):
    def train(**options):
        options = {
            "model_type": "bpe",
            "vocab_size": 400,
            "byte_fallback": True,
            "character_coverage": 0.99,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
        } | options
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 5),
            model_prefix=str(tmp_path / "tokenizer"),
            **options,
        )
        return SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))

    return train


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<b>", "▁▁", "▁▁▁"]},
    ],
)
def test_a_sentencepiece_model_keeps_its_reading(train, tmp_path, options):
    original = train(**options)
    unpack_sentencepiece(tmp_path, tmp_path)
    rebuilt = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = original.encode(text)
        assert rebuilt.encode(text, add_special_tokens=False).ids == ids, text
        assert rebuilt.decode(ids) == original.decode(ids)


def test_text_begins_with_one_bos_token(train, tmp_path):
    from transformers import AutoTokenizer

    train()
    unpack_sentencepiece(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("the dog")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert (tokenizer.eos_token, tokenizer.unk_token) == ("</s>", "<unk>")


def test_the_tokenizer_config_beside_a_model_counts(train, tmp_path):
    from transformers import AutoTokenizer

    original = train()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "eos_token": "<end>",
        "chat_template": "{{ messages }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 401, "<end>": 400}')
    unpack_sentencepiece(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("the dog<end>")[-1] == tokenizer.eos_token_id == 400
    assert tokenizer.encode("the dog") == original.encode("the dog")
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 330},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": True, "user_defined_symbols": ["<b>"]},
    ],
)
def test_a_model_that_cannot_be_rebuilt_is_refused(train, tmp_path, options):
    train(**options)
    with pytest.raises(ValueError, match="tokenizer.model reads '.*' in a way that"):
        unpack_sentencepiece(tmp_path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path} has neither tokenizer.json"
    ):
        unpack_sentencepiece(tmp_path, tmp_path)


def test_added_tokens_with_holes_are_refused(train, tmp_path):
    train()
    (tmp_path / "added_tokens.json").write_text('{"<end>": 407}')
    with pytest.raises(ValueError, match="added_tokens.json leaves ids out"):
        unpack_sentencepiece(tmp_path, tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"IQ== 0\nIg== 1\n"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(
        ValueError, match="tokenizer.model is not a SentencePiece model"
    ):
        unpack_sentencepiece(tmp_path, tmp_path)


def byte_level(cut, *merges, extra=()):
    """A vocabulary of all bytes and the results of ``merges``."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in merges]
    kinds = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    tokens += [token for token, _ in extra]
    return byte_level_bpe(tokens, merges, kinds, cut=cut)


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("default", ["a", "Ġ123", "4", ".", "Ġb"]),
        ("gpt-2", ["a", "Ġ1234", ".", "Ġb"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", ".", "Ġb"]),
        ("llama-bpe", ["a", "Ġ", "123", "4", ".", "Ġb"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", ".", "Ġb"]),
    ],
)
def test_text_is_cut_as_the_name_says(cut, pieces):
    merges = ["1 2", "12 3", "123 4", "Ġ 123", "Ġ 1234", "Ġ b", ". Ġ"]
    tokens = byte_level(cut, *merges).encode("a 1234. b").tokens
    if cut == "default":  # it splits off three digits, the space before them included
        pieces = ["a", "Ġ", "123", "4", ".", "Ġb"]
    assert tokens == pieces


def test_llama3_looks_whole_words_up_first():
    merges = ["a b", "b c", "a bc"]  # "abc" is in the vocabulary, but merges miss it
    assert byte_level("llama-bpe", *merges).encode("abc").tokens == ["abc"]
    assert byte_level("gpt-2", *merges).encode("abc").tokens == ["ab", "c"]


def test_qwen2_composes_characters():
    decomposed = unicodedata.normalize("NFD", "é")
    tokenizer = byte_level("qwen2")
    assert tokenizer.decode(tokenizer.encode(decomposed).ids) == "é"


def test_special_tokens_are_found_in_text_and_dropped_from_output():
    extra = [("<|end|>", CONTROL), ("<tool>", USER_DEFINED)]
    tokenizer = byte_level("smollm", extra=extra)
    ids = tokenizer.encode("a<tool> <|end|>").ids
    assert ids[-1] == 256 and ids[1] == 257
    assert tokenizer.decode(ids) == "a<tool> "


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", ["default", "smollm", "llama3", "deepseek-r1-qwen"])
def test_byte_level_text_survives(cut, text):
    tokenizer = byte_level(cut, "t h", "th e")
    expected = unicodedata.normalize("NFC", text) if "qwen" in cut else text
    assert tokenizer.decode(tokenizer.encode(text).ids) == expected


def test_an_unknown_cut_is_named():
    with pytest.raises(
        ValueError, match="tokenizer.ggml.pre='tekken' .*known are.*smoll"
    ):
        byte_level("tekken")


def test_merges_that_miss_their_tokens_are_refused():
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for merge in ("q zz", "nospace"):
        with pytest.raises(
            ValueError, match="merges do not fit the tokens .*out of voc"
        ):
            byte_level_bpe(tokens, [merge], [NORMAL] * 256, cut="gpt-2")


def test_a_token_twice_is_refused():
    with pytest.raises(ValueError, match="the token 'a' twice"):
        byte_level_bpe(["a", "b", "a"], [], [NORMAL] * 3, cut="gpt-2")


def test_the_written_tokenizer_opens_as_it_is(tmp_path):
    from mlx_lm.utils import load_tokenizer

    tokenizer = byte_level("smollm", "t h", extra=[("<s>", CONTROL), ("</s>", CONTROL)])
    ids = {"bos": 257, "eos": 258}
    config = {"chat_template": "{{ messages[0]['content'] }}"}
    write_tokenizer(tmp_path, tokenizer, ids, add_bos=True, config=config)
    opened = load_tokenizer(tmp_path)
    assert opened.encode("the") == [257, *tokenizer.encode("the").ids[1:]]
    assert len(opened.encode("the")) == 3
    assert opened.eos_token_ids == {258}
    assert opened.has_chat_template
