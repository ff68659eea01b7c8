"""A request is decided once, a folder checked once, a text tokenised once."""

import functools

import mlx.nn as nn
import pytest
from conftest import add_card, write_folder

from ifp_mlx import load
from ifp_mlx.generate import main
from ifp_mlx.model import decide as deciding
from ifp_mlx.selection import prompts
from ifp_mlx.storage import folder as folders
from ifp_mlx.storage.writer import write_store


@pytest.fixture
def counts(monkeypatch):
    """Count builds of a model, checks of a folder, decisions and tokenisations."""
    import mlx_lm.models.llama as llama

    import ifp_mlx.model.checkpoint
    import ifp_mlx.model.generation

    found = {}

    def count(home, name, label, also=()):
        real = getattr(home, name)

        @functools.wraps(real)
        def counted(*args, **kwargs):
            found[label] = found.get(label, 0) + 1
            return real(*args, **kwargs)

        for place in (home, *also):
            monkeypatch.setattr(place, name, counted)

    doors = (ifp_mlx.model.generation,)
    count(llama.Model, "__init__", "builds")
    count(folders, "_check_headers", "checks")
    count(deciding, "decide", "decisions", doors)
    count(prompts, "tokenize", "texts", (*doors, ifp_mlx.model.checkpoint))
    return found


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("memory", [(), ("--memory-gb", "0.005")])
@pytest.mark.parametrize("selector", ["activation", "random"])
def test_a_generate_builds_twice_and_does_the_rest_once(
    counts, tmp_path, capsys, selector, memory, stored
):
    model = write_folder(tmp_path / "model")
    if stored:
        model = write_store(model, tmp_path / "store")
    opened = load(model)[0]  # what is read once, for all that follow, is there
    opened.compute_prior()
    add_card(opened, {0.5: 0.9})
    counts.clear()
    cache = ("--cache-folder", str(tmp_path / "cache"))
    command = ["--model", str(model), "--prompt", "Hello", "--max-tokens", "2"]
    main([*command, "--selector", selector, *memory, *cache])
    # The dense shape is built once and the shape it is compared with once; prompt and
    # instruction are two texts.
    assert counts == {"builds": 2, "checks": 1, "decisions": 1, "texts": 2}


def test_opening_again_copies_the_structure_and_shares_no_array(tmp_path):
    source = folders.source_of(write_folder(tmp_path / "model"))
    one, other = source.open(), source.open()
    assert type(one) is type(other) is type(source.skeleton)
    assert one.args is not other.args
    assert one.model.norm.weight is not other.model.norm.weight
    assert isinstance(one, nn.Module)
