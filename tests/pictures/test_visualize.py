"""The page of selections: whole, alone, and with the figures that tasks gives."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import run_command, write_folder
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx import Selection, load
from ifp_mlx.evaluation import tasks
from ifp_mlx.evaluation.rows import Row, read_rows
from ifp_mlx.pictures.assemble import visualize
from ifp_mlx.pictures.measured import Point
from ifp_mlx.pictures.page import page
from ifp_mlx.pictures.svg import Axis, shade
from ifp_mlx.pictures.tally import Tally
from ifp_mlx.visualize import main

TEXTS = {"french": [[5, 9, 77]], "sql": [[3, 4, 250]], "story": [[60, 61, 8, 9]]}


def random_selection(seed, layers=5, channels=64, kept=24):
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.permutation(channels)[:kept]) for _ in range(layers)]
    return Selection(tuple(mx.array(r.astype(np.int32)) for r in rows), None, channels)


def read_page(path):
    """Return the page parsed, which it is only if it is well formed, and its data."""
    text = path.read_text(encoding="utf-8")
    body = text.partition("<script>")[0].partition("<body>")[2]
    tree = ElementTree.fromstring(f"<body>{body}</body>")
    data = next(node for node in tree.iter("script") if node.get("id") == "data")
    return text, tree, json.loads(data.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("visualize")
    model, tokenizer = load(write_folder(home / "tiny"))
    row = {"prompt": "Say water.", "completion": "It is <l'eau>!"}
    (home / "rows.jsonl").write_text(json.dumps(row))
    rows = read_rows(home / "rows.jsonl", tokenizer)
    for name, texts in TEXTS.items():
        examples = [Row(text, []) for text in texts]
        task = tasks.make(model, name, examples, keep=0.5)
        if name == "french":
            task = tasks.measure(model, task, rows)
        task.save(home / "tiny" / "tasks")
    return home / "tiny"


def test_the_page_shows_the_overlaps_that_tasks_counts(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    status, printed, err = run_command(
        main, capsys, "--model", folder, "--output", out, "--json"
    )
    assert status == 0, err
    _, tree, data = read_page(out)
    library = tasks.library(folder / "tasks")
    assert data["names"] == [task.name for task in library] == list(TEXTS)
    texts = [t.text for t in tree.iter("title")]
    found = []
    for a, one in enumerate(library):
        for b, other in enumerate(library):
            shares = tasks.overlap(one.selection, other.selection)
            np.testing.assert_allclose(data["overlaps"][a][b], shares[:, 0])
            np.testing.assert_allclose(data["chance"][a][b], shares[:, 1])
            said = f"{one.name} and {other.name} share {{:.1%}}; chance {{:.1%}}"
            # Layer 0 is kept whole; the first and the last pruned ones are shown.
            assert {said.format(*shares[n]) for n in (1, 2)} <= set(texts)
            if a < b:
                found.append(shares)
    report = json.loads(printed)
    mean = np.mean(found, axis=(0, 1))
    assert (report["overlap"], report["chance"]) == pytest.approx(tuple(mean))
    masks = {t.name: t.selection.mask_id for t in library}
    assert report["masks"] == masks
    assert all(
        any(mask == td.text for td in tree.iter("td")) for mask in masks.values()
    )


def test_the_page_needs_nothing_but_itself(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run_command(main, capsys, "--model", folder, "--output", out)[0] == 0
    text, tree, _ = read_page(out)
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(|<link|fetch\(", text)
    for drawn in (*tree.iter("svg"), *tree.iter("canvas")):
        assert drawn.get("role") == "img" and drawn.get("aria-label")
    assert "prefers-color-scheme: dark" in text


def test_every_channel_of_every_mask_is_in_the_page():
    selections = [random_selection(seed) for seed in range(3)]
    tally = Tally(["a", "b", "c"], selections)
    data = json.loads(
        re.search(r'id="data">(.*?)</script>', page("m", tally, [], []))[1]
    )
    raw = np.frombuffer(base64.b64decode(data["bits"]), dtype=np.uint8)
    bits = np.unpackbits(raw, bitorder="little")[: 3 * 5 * 64].reshape(3, 5, 64)
    for mask, selection in zip(bits, selections, strict=True):
        np.testing.assert_array_equal(mask, np.array(selection.mask()))


def test_names_cannot_break_the_page(tmp_path):
    name = "</script><b>&\"'"
    tally = Tally([name, "b"], [random_selection(0), random_selection(1)])
    out = tmp_path / "page.html"
    out.write_text(page("<i>model</i>", tally, [], []), encoding="utf-8")
    _, tree, data = read_page(out)
    assert data["names"][0] == name
    assert all(mark.get("class") for mark in tree.iter("i"))
    assert tree.find(".//h1").text.endswith("<i>model</i>")


def test_quality_is_shown_where_it_was_measured_and_said_where_not(
    folder, tmp_path, capsys
):
    out = tmp_path / "page.html"
    run_command(main, capsys, "--model", folder, "--output", out)
    text, tree, _ = read_page(out)
    card = tasks.TaskMask.load(folder / "tasks/french.safetensors").evaluation
    assert f"{card['kl']:.3f}" in [cell.text for cell in tree.iter("td")]
    assert "2 of 3 masks carry no measurement" in text
    assert "Speed was not measured for this page" in text


def written(path, found):
    path.write_text(f"some text\n{json.dumps(found)}\n")
    return path


SETTING = {"selector": "blend", "allocation": "uniform", "prefill": "compact"}
EVALUATION = {
    "results": [
        {"setting": None, "kl": 0.0, "agreement": 1.0, "tokens_per_second": 11.0},
        {
            "setting": SETTING | {"keep": 0.5},
            "kl": 1.25,
            "agreement": 0.5,
            "tokens_per_second": 17.0,
        },
    ]
}
BENCHMARK = {
    "cases": [
        {
            "max_tokens": 11,
            "prompt_tokens": 7,
            "keep": 0.25,
            "seconds": {"compact": {"decode": [1, 2, 4]}, "dense": {"decode": [5]}},
        }
    ]
}


def test_quality_and_speed_by_keep_come_from_their_reports(folder, tmp_path, capsys):
    out, pictures = tmp_path / "page.html", tmp_path / "png"
    status, printed, err = run_command(
        main, capsys, "--model", folder, "--output", out, "--png-folder", pictures,
        "--evaluation", written(tmp_path / "evaluation", EVALUATION),
        "--benchmark", written(tmp_path / "benchmark", BENCHMARK),
    )  # fmt: skip
    assert status == 0, err
    _, tree, _ = read_page(out)
    titles = [title.text for title in tree.iter("title")]
    line = "blend, uniform, compact prompt"
    assert {f"{line}: 0.5, 1.25", f"{line}: 0.5, 17", f"{line}: 1, 11"} <= set(titles)
    # Ten tokens in 2 s, the median, and in 5 s.
    bench = "benchmark, 7 prompt tokens"
    assert {f"{bench}: 0.25, 5", f"{bench}: 1, 2"} <= set(titles)
    files = [pictures / f"{name}.png" for name in ("strips", "overlap", "depth")]
    files += [pictures / f"{name}.png" for name in ("always", "quality", "speed")]
    assert printed.split() == [str(path) for path in (out, *files)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_one_mask_has_strips_and_no_overlap(folder, tmp_path, capsys):
    model, _ = load(folder)
    model.select("Hello", keep=0.25, allocation="uniform").save(
        tmp_path / "m.safetensors"
    )
    out = tmp_path / "page.html"
    given = ["--model", folder, "--mask-file", tmp_path / "m.safetensors"]
    status, _, err = run_command(
        main, capsys, *given, "--output", out, "--png-folder", tmp_path
    )
    assert status == 0, err
    text, tree, _ = read_page(out)
    assert len([c for c in tree.iter("canvas") if c.get("class") == "strips"]) == 1
    assert "Overlap between" not in text and (tmp_path / "strips.png").exists()


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    other, _ = load(write_folder(tmp_path / "other", seed=5))
    other.select("Hello", keep=0.5).save(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("nothing\n[1]\n")
    base = ["--model", folder, "--output", tmp_path / "page.html"]
    mistakes = {
        "made for another model": ["--mask-file", tmp_path / "other.safetensors"],
        "no mask file": ["--mask-file", tmp_path / "gone.safetensors"],
        "There is no task mask in": ["--tasks-folder", tmp_path],
        "both say what to draw": ["--mask-file", "x", "--tasks-folder", tmp_path],
        "holds no result of python -m ifp_mlx.evaluate": [
            "--evaluation", tmp_path / "text",
        ],
        "holds no result of python -m ifp_mlx.benchmark": [
            "--benchmark", tmp_path / "text",
        ],
    }  # fmt: skip
    for message, options in mistakes.items():
        status, _, err = run_command(main, capsys, *base, *options)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib_the_remedy_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    base = ["--model", folder, "--output", tmp_path / "page.html"]
    assert run_command(main, capsys, *base)[0] == 0
    status, _, err = run_command(main, capsys, *base, "--png-folder", tmp_path / "png")
    assert status == 2 and "pip install 'ifp_mlx[plot]'" in err


@given(st.integers(1, 4), st.integers(0, 99))
def test_what_is_counted_adds_up(masks, seed):
    selections = [random_selection(seed + n, kept=7 + n) for n in range(masks)]
    tally = Tally([str(n) for n in range(masks)], selections)
    np.testing.assert_allclose(tally.shares.sum(axis=1), 1)
    kept = tally.shares @ np.arange(masks + 1)
    np.testing.assert_allclose(kept, tally.sizes.sum(axis=0) / 64)
    np.testing.assert_allclose(tally.always, tally.masks.all(axis=0).mean(axis=1))
    for order, by in zip(tally.order, tally.kept_by, strict=True):
        assert sorted(order) == list(range(64))
        assert (np.diff(by[order]) <= 0).all()


@given(st.floats(0.01, 1), st.floats(0, 1))
def test_colours_fade_out_at_chance(chance, share):
    kind, strength = shade(share, chance)
    assert 0 <= strength <= 1 + 1e-9 and shade(chance, chance)[1] == 0
    assert kind == ("above" if share >= chance else "below")


@given(st.floats(0.001, 1e6), st.floats(0, 100))
def test_an_axis_has_a_few_round_ticks_inside_its_ends(span, low):
    axis = Axis("", low, low + span)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 10
    assert low - 1e-6 * span <= ticks[0] and ticks[-1] <= low + span * (1 + 1e-6)


def test_a_page_of_experts_speaks_of_experts(tmp_path):
    selections = [
        replace(random_selection(seed, channels=8, kept=3), unit="expert")
        for seed in range(3)
    ]
    point = Point("activation", 0.5, kl=0.1, agreement=0.9, speed=5, dense_speed=4)
    tally = Tally(["a", "b", "c"], selections)
    about = {"quality": [point], "speed": [point], "png_folder": tmp_path / "png"}
    visualize("m", tally, tmp_path / "page.html", **about)
    text, _, data = read_page(tmp_path / "page.html")
    assert data["unit"] == "expert" and "5 layers of 8 experts" in text
    assert "channel" not in re.sub("<script.*?</script>", "", text, flags=re.S)
    assert (tmp_path / "png" / "strips.png").exists()
