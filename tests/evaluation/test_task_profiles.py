"""Profiles of experts become tasks, and tasks profiles: the command."""

import json

import mlx.core as mx
import mlx_lm.utils
import pytest
from conftest import run_command, write_family, write_folder

from ifp_mlx import Selection, compact, load
from ifp_mlx.evaluation.tasks import TaskMask
from ifp_mlx.selection.profiles import FORMS
from ifp_mlx.tasks import main

# Eight experts in each of the layers 1 to 3, two of them for a token; layer 0 is dense.
KEPT = [[0, 2, 5, 7], [1, 2, 3, 4], [0, 4, 5, 6]]
MAP = dict(zip("123", KEPT, strict=True))
TOKENS = mx.array([[5, 9, 77, 200]])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("profiles") / "m", "qwen3_moe")


@pytest.fixture
def run(tmp_path, capsys):
    def command(verb, model, *options):
        where = ("--model", model, "--tasks-folder", tmp_path / "library")
        return run_command(main, capsys, verb, *where, *options)

    return command


@pytest.fixture
def take(run, tmp_path):
    def command(model, said, *options, name="code"):
        file = tmp_path / "profile.json"
        file.write_text(said if isinstance(said, str) else json.dumps(said))
        return run("import", model, "--profile", file, "--name", name, *options)

    return command


def kept(path):
    return [index.tolist() for index in Selection.load(path).indices]


def test_a_profile_becomes_a_task_that_makes_a_stock_folder(
    mixture, take, run, tmp_path, capsys
):
    status, out, err = take(mixture, MAP)
    file = tmp_path / "library/code.safetensors"
    assert (status, out) == (0, f"{file}\n")
    assert err.endswith(
        "profile.json is a profile of the form reap: it keeps 4 of 8 experts in each of "
        "3 layers.\n"
    )
    assert kept(file) == KEPT
    given = ("--model", mixture, "--task", "code", "--tasks-folder", file.parent)
    status, _, err = run_command(
        compact.main, capsys, *given, "--mlx-path", tmp_path / "out"
    )
    assert status == 0, err
    stock, config = mlx_lm.utils.load_model(tmp_path / "out")
    assert config["num_experts"] == 4
    model, _ = load(mixture)
    expected = model.compact(Selection.load(file))(TOKENS)
    assert mx.array_equal(stock(TOKENS), expected)
    listed = run("list", mixture)[1]
    assert "| code | 0.5 | uniform | a profile (reap) |" in listed


def test_a_task_of_a_profile_says_what_it_is_and_is_measured(mixture, take, tmp_path):
    rows = [{"prompt": "Say water.", "completion": "Water."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    status, out, err = take(
        mixture, MAP, "--held-out", tmp_path / "rows.jsonl", "--json"
    )
    assert status == 0, err
    about = json.loads(out)
    assert about["made"]["form"] == "reap" and about["layers"] == [4, 4, 4]
    assert (about["keep"], about["model"]) == (0.5, "m")
    assert about["evaluation"]["rows"] == 1 and about["evaluation"]["kl"] > 0
    task = TaskMask.load(tmp_path / "library/code.safetensors")
    assert task.selection.origin.selector == "task"
    assert mx.array_equal(task.scores, task.selection.mask())


@pytest.mark.parametrize("form", FORMS)
def test_a_task_that_was_exported_is_imported_the_same(
    form, mixture, take, run, tmp_path
):
    take(mixture, MAP)
    file = tmp_path / "out" / "profile.json"
    options = ("--name", "code", "--format", form, "--output", file)
    status, out, err = run("export", mixture, *options)
    assert (status, out) == (0, f"{file}\n"), err
    again = ["--profile", file, "--name", "again"]
    again += ["--keep", "0.5"] if form == "mlx-moe" else []  # which only ranks
    assert run("import", mixture, *again)[0] == 0
    assert kept(tmp_path / "library/again.safetensors") == KEPT
    status, _, err = run("export", mixture, *options)
    assert status == 2 and "profile.json already exists; delete it or choose" in err


def test_a_ranking_keeps_as_many_as_asked(mixture, take, tmp_path):
    ranks = {"saliency": [[8, 1, 7, 2, 6, 3, 5, 4]] * 3}
    file = tmp_path / "library/code.safetensors"
    for options, expected in (
        ((), [0, 2, 4, 5, 6, 7]),
        (("--keep", "0.5"), [0, 2, 4, 6]),
        (("--keep", "0.25"), [0, 2]),
        (("--target-size", "3"), [0, 2, 4]),
    ):
        assert take(mixture, ranks, *options)[0] == 0
        assert kept(file) == [expected] * 3
    assert Selection.load(file).origin.keep == 3 / 8


def test_large_scores_stay_finite_in_the_file(mixture, take, tmp_path):
    large = [[900_000, 0, 7, 2, 450_000, 3, 5, 4]] * 3  # more than float16 can hold
    assert take(mixture, {"saliency": large})[0] == 0
    scores = TaskMask.load(tmp_path / "library/code.safetensors").scores
    assert scores[0, 0] == 1 and scores[0, 4] == 0.5 and mx.isfinite(scores).all()


def test_a_ranking_fits_a_router_of_groups(take, tmp_path):
    model = write_family(tmp_path / "m", "deepseek_v3, groups")
    ranks = {"saliency": [[8, 7, 6, 5, 4, 3, 2, 1]] * 3}
    assert take(model, ranks)[0] == 0
    assert kept(tmp_path / "library/code.safetensors") == [[0, 1, 2, 4, 5, 6]] * 3
    status, _, err = take(model, ranks, "--target-size", "3", name="other")
    assert status == 2 and "3 experts a layer are no multiple of the 2 groups" in err
    status, _, err = take(model, {n: [0, 1, 2, 3] for n in "123"}, name="other")
    assert status == 2 and "keeps [4, 0] experts of the 2 groups" in err


RANKS = {"saliency": [[8, 1, 7, 2, 6, 3, 5, 4]] * 3}
BAD = [
    ("{", (), "A profile is JSON, and this is none"),
    (
        MAP | {"4": [0, 1, 2, 3]},
        (),
        'names the layer "4", and this model has experts in',
    ),
    (MAP | {"1": [0, 1, 2, 8]}, (), "this model's are 0 to 7; use a profile of this"),
    (
        MAP | {"1": [0, 1]},
        (),
        r"experts in its layers (2, 4, 4), and a stock model has",
    ),
    ({n: [3] for n in "123"}, (), "with 1 of its 8 experts has too few"),
    (RANKS, ("--target-size", "1"), "with 1 of its 8 experts has too few"),
    (RANKS, ("--target-size", "9"), "target_size=9 must be between 1 and the 8"),
    (RANKS, ("--keep", "1.5"), "keep=1.5 is not a share"),
    (MAP, ("--keep", "0.5"), "says itself which experts are kept; leave out keep"),
    (MAP, ("--target-size", "4"), "experts are kept; leave out target_size"),
]


@pytest.mark.parametrize(("said", "options", "why"), BAD)
def test_a_profile_that_cannot_be_had_leaves_nothing_behind(
    said, options, why, mixture, take, tmp_path
):
    status, out, err = take(mixture, said, *options)
    assert (status, out) == (2, "") and why in err and err.count("\n") == 1
    assert not (tmp_path / "library").exists()


def test_other_mistakes_are_one_sentence(mixture, take, run, tmp_path):
    dense = write_folder(tmp_path / "dense")
    model, _ = load(dense)
    model.select([5, 9], keep=0.5).save(tmp_path / "library/channels.safetensors")
    output = ("--output", tmp_path / "out.json", "--format", "reap")
    for (status, _, err), why in (
        (take(dense, MAP), "dense has no experts that could be selected"),
        (take(mixture, MAP, name="a/b"), "name='a/b' cannot be a task's"),
        (
            run("import", mixture, "--profile", tmp_path / "no", "--name", "x"),
            "There is no profile",
        ),
        (run("export", dense, "--name", "channels", *output), "keeps channels, and a"),
        (
            run("export", mixture, "--name", "channels", *output),
            "keeps channels, and this",
        ),
        (run("export", mixture, "--name", "gone", *output), "There is no task 'gone'"),
        (
            run("export", mixture, "--name", "x", *output[:2], "--format", "pt"),
            "invalid choice: 'pt' (choose from",
        ),
    ):
        assert status == 2 and why in err and err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
    assert [file.name for file in (tmp_path / "library").iterdir()] == [
        "channels.safetensors"
    ]
