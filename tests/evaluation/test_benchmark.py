"""Four ways of running a model take turns, and every figure is of one of them."""

import json

import pytest
from conftest import FAMILIES, run_command, thinned, write_folder
from mlx.utils import tree_flatten

from ifp_mlx import Selection, load
from ifp_mlx.benchmark import main
from ifp_mlx.evaluation.runners import ROWS, Run, stock_of_width
from ifp_mlx.evaluation.speed import Case, table
from ifp_mlx.storage.writer import write_store


def case():
    runs = {
        "dense": [Run(0, 1, 4, 6, 100, 50), Run(0, 1, 8, 6, 100, 50)],
        "compact": [Run(1, 1, 2, 3, 60, 25), Run(1, 3, 2, 2, 60, 25)],
        "activation": [Run(5, 0, 2, 3), Run(5, 0, 2, 3)],
        "stock": [Run(0, 0, 2, 3), Run(0, 0, 1, 4)],
    }
    return Case(16, 64, 9, 11, runs, {})


def test_ratios_are_taken_turn_by_turn():
    compared = case().ratios()
    assert compared["prefill speed, compact / dense"] == [2.0, 4.0]
    assert compared["decode speed, compact / stock"] == [1.0, 2.0]
    assert compared["time to first token, dense loaded / compact"] == [5 / 4, 9 / 6]
    assert compared["select and load, compact / prefill, dense"] == [0.5, 0.5]


def test_the_table_shows_medians_and_leaves_out_what_a_row_does_not_do():
    shown = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in table([case()]).splitlines()
    ]
    rows = {line[2]: line for line in shown[2:]}
    assert list(rows) == list(ROWS)
    compact = ["0.25", "9", "compact", "1.000", "2.000", "", "2.000", "5.000", "4.0"]
    assert rows["compact"][:9] == compact
    assert rows["stock"][3:6] == ["", "", ""] and rows["stock"][7] == ""


@pytest.mark.parametrize(
    ("stored", "keeps"), thinned([(False, (0.5,)), (True, (0.5, 0.25))], 2)
)
def test_the_command_runs_four_rows_for_every_keep_and_length(
    tmp_path, capsys, stored, keeps
):
    folder = write_folder(tmp_path / "tiny")
    if stored:
        folder = write_store(folder, tmp_path / "store")
    picture, turns = tmp_path / "speed.svg", 3 - len(keeps)
    status, out, err = run_command(
        main, capsys, "--model", folder, "--keep", *keeps, "--turns", turns, "--plot",
        picture, "--prompt-tokens", 9, 12, "--max-tokens", 3, "--cold", "--json",
    )  # fmt: skip
    assert status == 0, err
    cases = json.loads(out.splitlines()[-1])["cases"]
    shapes = [(c["target_size"], c["prompt_tokens"]) for c in cases]
    assert shapes == [(round(64 * keep), n) for keep in keeps for n in (9, 12)]
    for found in cases:
        assert all(len(values) == turns for values in found["ratios"].values())
        assert all(len(values) == turns for values in found["cold_seconds"].values())
        rows = found["seconds"]
        assert list(rows) == list(ROWS)
        assert rows["compact"]["peak_bytes"][0] < rows["dense"]["peak_bytes"][0]
        if stored:  # a store is not read where it is not selected
            assert rows["compact"]["read_bytes"][0] < rows["dense"]["read_bytes"][0]
    assert picture.read_text().startswith("<?xml")


def test_a_mask_file_is_what_the_compact_row_loads(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    model, _ = load(folder)
    for allocation in ("uniform", "first-layer"):
        options = {"selector": "random", "allocation": allocation}
        model.select("Hi", **options).save(tmp_path / f"{allocation}.safetensors")
    common = ("--model", folder, "--turns", 1, "--max-tokens", 3, "--json")
    mask = tmp_path / "uniform.safetensors"
    status, out, err = run_command(main, capsys, *common, "--mask-file", mask)
    assert status == 0, err
    (found,) = json.loads(out.splitlines()[-1])["cases"]
    assert found["target_size"] == Selection.load(mask).target_size
    ragged = tmp_path / "first-layer.safetensors"
    status, _, err = run_command(main, capsys, *common, "--mask-file", ragged)
    assert status == 2 and "different widths per layer" in err


def test_mistakes_are_one_line_and_exit_status_2(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    for mistake, sentence in (
        (["--max-tokens", "1"], "--max-tokens 1 at least 2"),
        (["--prompt-tokens", "5", "0"], "--prompt-tokens 0"),
        (["--keep", "2"], "keep=2.0"),
    ):
        status, _, err = run_command(main, capsys, "--model", folder, *mistake)
        assert status == 2 and sentence in err


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_model_has_the_weights_of_the_compact_one(tmp_path, family):
    from mlx_lm.utils import load_model, save_model

    folder = write_folder(tmp_path / "m", family)
    if family.startswith("gemma"):  # as real folders have it: no head of their own
        weights = load_model(folder)[0]
        weights.pop("lm_head", None)
        (folder / "model.safetensors").unlink()
        save_model(folder, weights)
    model, _ = load(folder)
    compact = model.compact(model.select([1, 2], target_size=16, selector="random",
                                         allocation="uniform"))  # fmt: skip
    shapes = [
        {name: weight.shape for name, weight in tree_flatten(found.parameters())}
        for found in (stock_of_width(model, 16), compact)
    ]
    assert shapes[0] == shapes[1]
