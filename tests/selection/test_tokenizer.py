"""The tokenizer of a model folder: what it may hold, and what is said of the rest."""

import io
import json
import re

import pytest
from conftest import CHAT_TEMPLATE, ROOT, run_command, train_sentencepiece, write_folder

from ifp_mlx import load
from ifp_mlx.compact import main as compact
from ifp_mlx.engine import Engine, IncompatibleModel
from ifp_mlx.engine.lanes import Text
from ifp_mlx.generate import main as generate
from ifp_mlx.selection.tokenizer import open_tokenizer
from ifp_mlx.tasks import main as tasks
from ifp_mlx.training.recipe import TrainConfig
from ifp_mlx.training.trainee import open_trainee

REFUSED = "asks to run code from the model folder, which is never done"


@pytest.fixture(params=["tokenizer_config.json", "config.json"])
def with_code(request, tmp_path, monkeypatch):
    """A folder whose tokenizer is Python of its own, and someone who says yes to it."""
    folder = write_folder(tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import *\n"
    code += (
        "class Own(PreTrainedTokenizerFast): pass\nclass Config(PretrainedConfig): pass"
    )
    (folder / "own.py").write_text(code)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "Own"
    tokenizer["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if request.param == "config.json":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "own.Config"}
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 9)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on stdin"))
    yield folder
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (generate, ["--prompt", "-"]),
        (compact, ["--instruction", "Hi", "--mlx-path", "out"]),
        (tasks, ["make", "--name", "french", "--instruction", "Hi"]),
    ],
)
def test_no_command_runs_code_of_a_model_folder(with_code, main, arguments, capsys):
    given = [*arguments, "--model", with_code]
    status, out, err = run_command(main, capsys, *given)
    assert status == 2 and REFUSED in err and out == "" and err.count("\n") == 1


def test_no_api_runs_code_of_a_model_folder(with_code):
    with pytest.raises(ValueError, match=REFUSED):
        load(with_code)
    with pytest.raises(IncompatibleModel, match=REFUSED):
        Engine.open(with_code)
    with pytest.raises(ValueError, match=REFUSED):
        open_trainee(TrainConfig(model=str(with_code), data="d", output="o"))


def test_every_door_opens_tokenizers_in_one_place():
    files = ROOT.glob("ifp_mlx/**/*.py")
    opens = re.compile(
        "load_tokenizer|AutoTokenizer|AutoConfig|AutoModel|mlx_lm import load"
    )
    found = [file.name for file in files if opens.search(file.read_text())]
    assert found == ["tokenizer.py"]


def test_a_built_in_class_serves_a_folder_that_names_its_own_as_well(tmp_path):
    folder = write_folder(tmp_path / "model")
    expected = load(folder)[1].encode("Hello")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    config["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    path.write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit")
    assert load(folder)[1].encode("Hello") == expected


def test_chat_template_json_alone_is_used(tmp_path, capsys):
    folder = write_folder(tmp_path / "model")
    chat = [{"role": "user", "content": "Hello"}]
    expected = load(folder)[1].apply_chat_template(chat)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    template = folder / "chat_template.json"
    template.write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert load(folder)[1].apply_chat_template(chat) == expected
    out = tmp_path / "out"
    given = ["--model", folder, "--instruction", "Hi", "--mlx-path", out]
    status, _, err = run_command(compact, capsys, *given)
    assert status == 0, err
    template.unlink()  # stock mlx-lm does not read it, and answers alike
    (out / "chat_template.json").unlink()
    assert load(out)[1].apply_chat_template(chat) == expected
    template.write_text('{"chat_template": null}')
    with pytest.raises(
        ValueError, match=r"chat_template.json holds no text .*\(None\)"
    ):
        load(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3522972\n"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [POINTER, "{", "[]", ""])
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path, file, content):
    folder = write_folder(tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} is not a JSON object .*fetch"):
        open_tokenizer(folder, {})


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer; put"):
        open_tokenizer(tmp_path, {"model_type": "llama"})


TEXTS = [
    "🎉🥑",
    "naïve café",
    "日本語",
    "a b  c\n\n d",
    "Hello how are you",
    "x\u0301y",
]


def streamed(tokenizer, text):
    """Return a text as a stream of its tokens gives it."""
    found = Text(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return "".join([*map(found.add, tokens), found.finish()])


def test_streamed_text_is_what_was_encoded(tmp_path):
    tokenizer = load(write_folder(tmp_path / "model"))[1]
    assert [streamed(tokenizer, text) for text in TEXTS] == TEXTS


def test_text_comes_once_where_there_is_no_tokenizer_json(tmp_path):
    pytest.importorskip("sentencepiece")
    folder = write_folder(tmp_path / "model", vocab_size=330)
    train_sentencepiece(folder, "the quick brown fox", "a man a plan")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder)[1]
    assert [streamed(tokenizer, text) for text in TEXTS] == TEXTS


def test_a_decoder_that_is_not_the_vocabularys_leaves_no_strange_letters(tmp_path):
    folder = write_folder(tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    path.write_text(json.dumps(content))
    tokenizer = load(folder)[1]
    assert [streamed(tokenizer, text) for text in TEXTS] == TEXTS
