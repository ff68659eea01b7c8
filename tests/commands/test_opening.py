"""What a command opens: no tokenizer where no text is read, and few skeletons."""

import importlib

import pytest
from conftest import run_command

from ifp_mlx import load
from ifp_mlx.evaluation.rows import Row
from ifp_mlx.evaluation.tasks import make
from ifp_mlx.model import checkpoint

MODEL = ["--model", "FOLDER"]
TASKS = ["--tasks-folder", "LIBRARY"]
# What each is given; generate reads a text.
COMMANDS = {
    "compact": [*MODEL, "--mask-file", "MASK", "--mlx-path", "OUT"],
    "plan": MODEL,
    "visualize": [*MODEL, *TASKS, "--output", "OUT"],
    "tasks list": [*MODEL, *TASKS],
    "tasks overlap": [*MODEL, *TASKS],
    "tasks merge": [*MODEL, *TASKS, "--name", "c", "--tasks", "a", "b"],
    "channel_store": [*MODEL, "--output", "OUT"],
    "generate": [*MODEL, "--mask-file", "MASK", "--prompt", "hello", "-m", "2"],
}


@pytest.fixture
def command(tiny_folder, tmp_path, capsys):
    """Runs one of the commands on a library of two masks."""
    model, _ = load(tiny_folder)
    library, mask = tmp_path / "library", tmp_path / "mask.safetensors"
    for name, tokens in (("a", [5, 6, 7]), ("b", [8, 9])):
        make(model, name, [Row(tokens, [])], keep=0.5).save(library)
    options = {"keep": 0.5, "selector": "activation", "allocation": "uniform"}
    model.select([5, 6], **options).save(mask)
    places = {"FOLDER": tiny_folder, "LIBRARY": library, "OUT": tmp_path / "out"}
    places["MASK"] = mask

    def run(name):
        module, *verb = name.split()
        main = importlib.import_module(f"ifp_mlx.{module}").main
        given = [*verb, *(places.get(word, word) for word in COMMANDS[name])]
        status, out, err = run_command(main, capsys, *given)
        assert status == 0, err
        return out

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tokenizer_is_opened_only_where_a_text_is_read(name, command, monkeypatch):
    opened, stock = [], checkpoint.open_tokenizer

    def counting(*about):
        opened.append(about)
        return stock(*about)

    monkeypatch.setattr(checkpoint, "open_tokenizer", counting)
    command(name)
    assert len(opened) == (name == "generate")


# One as it is and one that is wider tell what is sliced; a folder's width is checked
# before the work, and by what writes it.
BUILDS = {"compact": 4, "plan": 2, "visualize": 2, "channel_store": 4}


@pytest.mark.parametrize(("name", "count"), BUILDS.items())
def test_the_class_of_a_model_is_built_no_oftener_than_needed(
    name, count, command, tiny_folder, monkeypatch
):
    kind = type(load(tiny_folder)[0].source.skeleton)
    build, built = kind.__init__, []

    def counting(model, args):
        built.append(args)
        build(model, args)

    monkeypatch.setattr(kind, "__init__", counting)
    command(name)
    assert len(built) == count
