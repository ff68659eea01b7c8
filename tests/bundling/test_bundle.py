"""Bundles for apps: what is in them, and that they are what they say."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import run_command, write_folder, write_quantised

from ifp_mlx import load
from ifp_mlx.bundle import main
from ifp_mlx.compact import main as compact
from ifp_mlx.files.tensors import weights_of
from ifp_mlx.selection.masks import Selection

TOKENS = mx.array([[5, 9, 77, 200, 13]])
HOW = ("--keep", "0.5", "--no-compensate", "--selector", "activation")
TASKS = {"french": "You translate English into French.", "codes": "Name a currency."}
CARD = "---\nlicense: apache-2.0\n---\n# Tiny\n"


def make(folder: Path, out: Path, *more) -> None:
    pairs = [f"--prepare={name}={text}" for name, text in TASKS.items()]
    main([*map(str, ("--model", folder, *pairs, *HOW, "--output", out, *more))])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("models") / "Tiny-Llama")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("the licence")
    return folder


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """A bundle of two tasks that no test changes."""
    out = tmp_path_factory.mktemp("bundles") / "concierge"
    make(dense, out, "--bundle-version", "1.2", "--prefetch", "french")
    return out


@pytest.fixture(scope="module")
def folders(dense, tmp_path_factory):
    """The tasks' compact folders, as ``compact`` makes them."""
    parent, found = tmp_path_factory.mktemp("folders"), {}
    for name, text in TASKS.items():
        given = ("--model", dense, "--instruction", text, *HOW)
        found[name] = parent / name
        compact([*map(str, (*given, "--mlx-path", found[name]))])
    return found


def about(bundle: Path) -> dict:
    return json.loads((bundle / "metadata.json").read_text())


def files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def test_what_tasks_share_is_stored_once_and_the_rest_with_each_task(whole):
    found = {path for path in files_in(whole) if not path.startswith("swift/")}
    own = {"ifp.mask", "README.md", "model.safetensors.index.json"}
    task_files = {
        f"tasks/{task}/{file}"
        for task in TASKS
        for file in {*own, f"model-{task}.safetensors"}
    }
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE")
    core = {f"core/{name}" for name in (*names, "model-core.safetensors")}
    packs = {f"asset-packs/{name}.json" for name in ("metadata", "core", *TASKS)}
    root = {"metadata.json", "metadata.schema.json", "SHA256SUMS", "README.md"}
    assert found == core | task_files | packs | root
    assert {n.split(".")[-3] for n in weights_of(whole / "tasks/french")} == {"mlp"}
    assert not any("mlp" in name for name in weights_of(whole / "core"))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_taken_out_is_the_folder_that_compact_makes(
    task, whole, folders, tmp_path, capsys
):
    import mlx_lm

    out = tmp_path / "out"
    status, line, err = run_command(
        main, capsys, "--take", whole, task, "--output", out
    )
    assert (status, line) == (0, f"{out}\n"), err
    stock, tokenizer = mlx_lm.load(str(out))
    expected, _ = mlx_lm.load(str(folders[task]))
    assert mx.array_equal(stock(TOKENS), expected(TOKENS))
    assert mlx_lm.generate(stock, tokenizer, "Hello", max_tokens=3)
    found, made = weights_of(out), weights_of(folders[task])
    assert found.keys() == made.keys()
    assert all((found[n].mapped() == made[n].mapped()).all() for n in made)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.keys()
    assert {out / name for name in index["weight_map"].values()} == {
        tensor.file for tensor in found.values()
    }
    assert load(out)[0].channels == 32  # and this package opens it as any folder
    assert (out / "LICENSE").read_text() == "the licence"


def test_metadata_is_what_the_schema_says_and_what_the_folder_holds(whole):
    from jsonschema import Draft202012Validator

    said = about(whole)
    schema = json.loads((whole / said["$schema"]).read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(said)
    assert said["name"] == "concierge" and said["version"] == "1.2"
    assert said["kind"] == "mlx" and said["context_length"] == 512
    licence = {"license": "apache-2.0", "license_files": ["core/LICENSE"]}
    assert said["base_model"] == {"name": "Tiny-Llama", "source": None} | licence
    for name, task in said["tasks"].items():
        mask = Selection.load(whole / "tasks" / name / "ifp.mask")
        assert task["instruction"] == TASKS[name] and task["keep"] == 0.5
        assert (task["mask_id"], task["identity"]) == (mask.mask_id, mask.identity)
        assert task["agreement"] == mask.origin.agreement is not None
        assert task["parts"] == ["core", name]
    for part in said["parts"].values():
        assert files_in(whole / part["folder"]) == {
            Path(path).relative_to(part["folder"]).as_posix() for path in part["files"]
        }
        for path, file in part["files"].items():
            content = (whole / path).read_bytes()
            assert file["bytes"] == len(content)
            assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert part["bytes"] == sum(file["bytes"] for file in part["files"].values())
    assert said["bytes"] == sum(part["bytes"] for part in said["parts"].values())


def test_every_key_of_the_metadata_has_a_meaning():
    import ifp_mlx.bundling

    text = Path(ifp_mlx.bundling.__file__).with_name("metadata.schema.json").read_text()
    schemas = [json.loads(text)]
    while schemas:
        schema = schemas.pop()
        for name, key in schema.get("properties", {}).items():
            assert key.get("description"), name
            schemas.append(key)
        if isinstance(schema.get("additionalProperties"), dict):
            schemas.append(schema["additionalProperties"])


def test_the_manifests_have_the_documented_keys_and_name_every_file(whole):
    said, packed = about(whole), set()
    for file in (whole / "asset-packs").iterdir():
        pack = json.loads(file.read_text())
        assert {*pack} == {
            "assetPackID",
            "downloadPolicy",
            "fileSelectors",
            "platforms",
        }
        [(policy, when)] = pack["downloadPolicy"].items()
        events = ["firstInstallation", "subsequentUpdate"]
        expected = {} if policy == "onDemand" else {"installationEventTypes": events}
        assert when == expected
        assert pack["platforms"] == ["iOS", "macOS"]
        if file.stem == "metadata":
            assert (pack["assetPackID"], policy) == ("concierge", "essential")
        else:
            part = said["parts"][file.stem]
            assert (pack["assetPackID"], policy) == (
                part["asset_pack"],
                part["download"],
            )
        for selector in pack["fileSelectors"]:  # from the folder around the bundle
            [(kind, path)] = selector.items()
            found = whole.parent / path
            assert found.is_dir() if kind == "directory" else found.is_file()
            inside = files_in(found) if found.is_dir() else [""]
            packed |= {(found / path).relative_to(whole).as_posix() for path in inside}
    listed = {path for part in said["parts"].values() for path in part["files"]}
    assert packed == listed | {"metadata.json"}
    policies = {name: part["download"] for name, part in said["parts"].items()}
    assert policies == {"core": "essential", "french": "prefetch", "codes": "onDemand"}


def test_sha256sum_accepts_every_file(whole, capsys):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum on this system")
    run = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=whole, text=True)
    assert run.returncode == 0
    sums = (whole / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in sums} == files_in(whole) - {"SHA256SUMS"}
    status, out, err = run_command(main, capsys, "--verify", whole, "--json")
    assert status == 0 and json.loads(out)["tasks"] == [*TASKS]
    assert "all as it was made" in err


def test_a_damaged_file_is_found(whole, tmp_path, capsys):
    def changed(path: str, change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        change(copy / path)
        status, out, err = run_command(main, capsys, "--verify", copy)
        assert (status, out) == (2, "") and err.count("\n") == 1
        return err

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    weights = "tasks/french/model-french.safetensors"
    assert f"{weights} has another SHA-256" in changed(weights, flip)
    assert "README.md has another SHA-256" in changed("README.md", flip)
    assert f"{weights} is missing" in changed(weights, Path.unlink)
    cut = changed(weights, lambda file: file.write_bytes(b"12"))
    assert f"{weights} has 2 bytes instead of " in cut
    more = changed("core/model-more.safetensors", lambda file: file.write_text("1"))
    assert "core/model-more.safetensors is not listed" in more
    taken = ("--take", tmp_path / "copy", "french", "--output", tmp_path / "out")
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "copy")
    flip(tmp_path / "copy" / weights)
    status, _, err = run_command(main, capsys, *taken)
    assert status == 2 and f"{weights} has another SHA-256" in err
    assert not (tmp_path / "out").exists()


def same_name(said: dict) -> None:
    """Let a task have a file that the core has."""
    parts = said["parts"]
    file = parts["core"]["files"]["core/LICENSE"]
    parts["codes"]["files"]["tasks/codes/LICENSE"] = file
    parts["codes"]["bytes"] += file["bytes"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda said: said.update(format="other"), "its format is 'other'"),
        (
            lambda said: said.pop("parts"),
            "not of the format ifp_mlx.bundle.1 ('parts')",
        ),
        (lambda said: said["tasks"]["codes"].update(parts=["x"]), "needs the part 'x'"),
        (
            lambda said: said["tasks"]["codes"].update(parts=["codes"]),
            "the task 'codes' is without the part 'core'",
        ),
        (
            lambda said: said["parts"].update({"../..": said["parts"]["codes"]}),
            "'../..' is no name of a part",
        ),
        (
            lambda said: said["parts"]["core"]["files"].update(
                {"core/./config.json": said["parts"]["core"]["files"]["core/LICENSE"]}
            ),
            "'core/./config.json' is not inside the part 'core'",
        ),
        (same_name, "two parts of the task 'codes' have a file of one name"),
        (
            lambda said: said["parts"]["core"]["files"].update(
                {"core/../../secret": {"bytes": 1, "sha256": "0" * 64}}
            ),
            "'core/../../secret' is not inside the part 'core'",
        ),
    ],
)
def test_metadata_of_a_stranger_is_not_trusted(
    change, sentence, whole, tmp_path, capsys
):
    said = about(whole)
    change(said)
    (tmp_path / "metadata.json").write_text(json.dumps(said))
    given = ("--take", tmp_path, "codes", "--output", tmp_path / "out")
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["metadata.json", "SHA256SUMS"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe"])
def test_files_of_a_stranger_are_one_sentence(content, name, whole, tmp_path, capsys):
    bundle = shutil.copytree(whole, tmp_path / "copy")
    (bundle / name).write_bytes(content)
    status, _, err = run_command(main, capsys, "--verify", bundle)
    assert status == 2 and str(bundle / name) in err and err.count("\n") == 1


def test_a_task_is_taken_out_of_a_bundle_of_links(whole, tmp_path, capsys):
    bundle = shutil.copytree(whole, tmp_path / "copy")
    weights = bundle / "core/model-core.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to("../../blob")
    out = tmp_path / "there" / "codes"
    given = ("--take", bundle, "codes", "--output", out)
    assert run_command(main, capsys, *given)[0] == 0
    taken = (out / weights.name).read_bytes()
    assert taken == (tmp_path / "blob").read_bytes()


def test_compact_folders_make_the_same_parts_as_the_model(
    whole, folders, tmp_path, capsys
):
    out = tmp_path / "concierge"
    given = ("--folders", *folders.values(), "--output", out, "--json")
    status, line, err = run_command(main, capsys, *given)
    assert status == 0, err
    report, said = json.loads(line), about(out)
    for name in ("core", *TASKS):
        found, made = (b["parts"][name]["files"] for b in (said, about(whole)))
        differing = {path for path in found if found[path] != made[path]}
        # What safetensors says of itself, it writes in any order.
        assert found.keys() == made.keys()
        assert differing <= {f"tasks/{name}/ifp.mask"}
    apart = sum(weights.stat().st_size for weights in _weights(folders))
    stored = sum(weights.stat().st_size for weights in out.rglob("*.safetensors"))
    assert stored < 0.8 * apart < report["separate_bytes"]
    assert report["bytes"] == said["bytes"]


def _weights(folders: dict[str, Path]) -> list[Path]:
    return [
        file for folder in folders.values() for file in folder.glob("*.safetensors")
    ]


def test_one_task_is_all_core_and_has_the_name_it_is_given(dense, tmp_path, capsys):
    given = ("--model", dense, "--instruction", "Hi", *HOW, "--name", "greet")
    status, _, err = run_command(main, capsys, *given, "--output", tmp_path / "app")
    assert status == 0, err
    said = about(tmp_path / "app")
    assert [*said["parts"]] == ["core"] and said["tasks"]["greet"]["parts"] == ["core"]
    assert not (tmp_path / "app/tasks").exists()
    taken = ("--take", tmp_path / "app", "greet", "--output", tmp_path / "out")
    assert run_command(main, capsys, *taken)[0] == 0
    assert load(tmp_path / "out")[0].channels == 32


def test_tasks_of_the_library_keep_their_names(dense, folders, tmp_path, capsys):
    library = tmp_path / "tasks"
    library.mkdir()
    for name, folder in folders.items():
        mask = Selection.load(folder / "ifp.mask").plain()
        mask.save(library / f"{name}.safetensors")
    given = ("--model", dense, "--tasks", *TASKS, "--tasks-folder", library)
    status, _, err = run_command(main, capsys, *given, "--output", tmp_path / "app")
    assert status == 0, err
    for name, folder in folders.items():
        mask = Selection.load(folder / "ifp.mask")
        assert about(tmp_path / "app")["tasks"][name]["mask_id"] == mask.mask_id


def test_a_quantised_model_says_so_and_shares_what_it_can(tmp_path, capsys):
    source = write_quantised(tmp_path / "q")
    pairs = [f"--prepare={name}={text}" for name, text in TASKS.items()]
    given = ("--model", source, *pairs, *HOW, "--granularity", 64)
    status, line, err = run_command(
        main, capsys, *given, "--output", tmp_path / "app", "--json"
    )
    assert status == 0, err
    said = about(tmp_path / "app")
    assert said["quantisation"]["bits"] == 4
    names = {n.split(".")[-2] for n in weights_of(tmp_path / "app/tasks/french")}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    assert "Warning: the licence of q is unknown" in err
    assert said["base_model"]["license"] is None


def test_a_licence_can_be_named(dense, folders, tmp_path, capsys):
    given = ("--folders", folders["codes"], "--output", tmp_path / "app")
    more = ("--license", "mit", "--source", "https://example.org/tiny")
    status, _, err = run_command(main, capsys, *given, *more)
    assert status == 0 and "Warning" not in err
    base = about(tmp_path / "app")["base_model"]
    assert (base["license"], base["source"]) == ("mit", "https://example.org/tiny")


def test_a_bundle_gives_way_only_when_it_is_told_to(whole, folders, tmp_path, capsys):
    out = tmp_path / "concierge"
    shutil.copytree(whole, out)
    given = ("--folders", folders["codes"], "--output", out)
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "concierge already exists" in err
    assert [*about(out)["tasks"]] == [*TASKS]
    assert run_command(main, capsys, *given, "--force")[0] == 0
    assert [*about(out)["tasks"]] == ["codes"]
    assert [path.name for path in tmp_path.iterdir()] == ["concierge"]
    (tmp_path / "photos").mkdir()
    given = ("--folders", folders["codes"], "--output", tmp_path / "photos", "--force")
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "is no bundle, so it is not replaced" in err


def test_mistakes_are_one_line_and_exit_status_2(
    whole, folders, dense, tmp_path, capsys
):
    other = write_folder(tmp_path / "other", seed=1, vocab_size=260)
    out = ("--output", tmp_path / "app")
    model = ("--model", dense, *out)
    mistakes = {
        "Nothing says what to do": (*model,),
        "--prepare and --verify says what to do": (
            *(*model, "--prepare", "a=Hi", "--verify", whole),
        ),
        "--prepare 'french' is not of the form": (*model, "--prepare", "french"),
        "--prepare names a task twice": (*model, "--prepare", "a=Hi", "--prepare=a=Ho"),
        "--name a is the name of a single task": (
            *(*model, "--name", "a", "--prepare", "b=Hi"),
        ),
        "'x' is to be prefetched and is no task of this bundle; its tasks are a": (
            *(*model, "--prepare", "a=Hi", "--prefetch", "x"),
        ),
        "Give --output": ("--model", dense, "--prepare", "a=Hi"),
        "'a b' cannot be the name of a task": (*model, "--prepare", "a b=Hi"),
        "A task cannot be called 'core'": (*model, "--prepare", "core=Hi"),
        "A task cannot be called 'Core'": (*model, "--prepare", "Core=Hi"),
        "The tasks 'a' and 'A' differ in case alone": (
            *(*model, "--prepare", "a=Hi", "--prepare", "A=Ho"),
        ),
        "'my app' cannot be the name of a bundle": (
            *("--folders", folders["codes"], "--output", tmp_path / "my app"),
        ),
        "--context-length 64 is for --format coreml": (
            *(*model, "--prepare", "a=Hi", "--context-length", 64),
        ),
        "--folders takes what was made before": (
            *("--folders", folders["codes"], *out, "--keep", "0.5"),
        ),
        "have no tensor in common": ("--folders", folders["codes"], other, *out),
        "has no task 'german'; its tasks are french, codes": (
            *("--take", whole, "german", *out),
        ),
        "has no metadata.json": ("--verify", dense),
        "config.json is missing": ("--folders", tmp_path, *out),
    }
    for sentence, given in mistakes.items():
        status, line, err = run_command(main, capsys, *given)
        assert (status, line) == (2, "") and sentence in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def write_package(parent: Path, name: str, *functions: str) -> Path:
    """Write what ifp_mlx to-coreml leaves, as far as a bundle looks at it."""
    package, folder = parent / f"{name}.mlpackage", parent / name
    for path in (package / "Data", folder / "masks"):
        path.mkdir(parents=True)
    (package / "Manifest.json").write_text(name)
    (package / "Data/weight.bin").write_bytes(b"w" * 100)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("the licence")
    (folder / "reference.npz").write_bytes(b"1")
    masks = {f: Selection((mx.arange(4),) * 2, None, 8) for f in functions}
    for function, mask in masks.items():
        mask.save(folder / "masks" / f"{function}.safetensors")
    about = {"base_model": "tiny", "licence": "mit", "context_length": 256}
    about |= {"functions": {f: {"mask_id": m.mask_id} for f, m in masks.items()}}
    (folder / "manifest.json").write_text(json.dumps(about | {"quantisation": None}))
    return package


@pytest.mark.parametrize("given", ["app.mlpackage", "app"])
def test_a_core_ml_package_is_the_core_and_its_functions_are_the_tasks(
    given, tmp_path, capsys
):
    write_package(tmp_path, "app", *TASKS)
    out = tmp_path / "concierge"
    status, _, err = run_command(
        main, capsys, "--coreml", tmp_path / given, "--output", out
    )
    assert status == 0, err
    said = about(out)
    assert said["kind"] == "coreml" and said["minimum_os"]["iOS"] == "18.0"
    assert said["base_model"]["license"] == "mit" and said["context_length"] == 256
    assert [*said["parts"]] == ["core"]
    for name, task in said["tasks"].items():
        assert (task["function"], task["parts"], task["keep"]) == (name, ["core"], 0.5)
    names = {"tokenizer.json", "LICENSE", "manifest.json"}
    names |= {"model.mlpackage/Manifest.json", "model.mlpackage/Data/weight.bin"}
    assert files_in(out / "core") == names
    assert run_command(main, capsys, "--verify", out)[0] == 0


@pytest.mark.coreml
def test_tasks_of_a_model_are_exported_to_core_ml(dense, tmp_path, capsys):
    pytest.importorskip("coremltools")
    given = ("--model", dense, "--prepare=french=Hi", "--prepare=codes=Ho", *HOW)
    more = ("--format", "coreml", "--context-length", 64)
    out = tmp_path / "app"
    status, _, err = run_command(main, capsys, *given, *more, "--output", out)
    assert status == 0, err
    said = about(out)
    assert said["kind"] == "coreml" and said["context_length"] == 64
    assert [task["function"] for task in said["tasks"].values()] == ["french", "codes"]
    assert said["base_model"]["license"] == "apache-2.0"
    assert run_command(main, capsys, "--verify", out)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["app"]


def test_core_ml_packages_of_one_function_each_are_fetched_on_demand(tmp_path, capsys):
    packages = [write_package(tmp_path, name, "main") for name in TASKS]
    out = tmp_path / "concierge"
    given = ("--coreml", *packages, "--output", out)
    status, _, err = run_command(main, capsys, *given)
    assert status == 0, err
    said = about(out)
    assert [*said["parts"]] == ["core", *TASKS]
    assert {task["function"] for task in said["tasks"].values()} == {"main"}
    # A package is not torn apart, though a file in it is the same in both.
    for name in TASKS:
        assert "model.mlpackage/Data/weight.bin" in files_in(out / "tasks" / name)
    assert files_in(out / "core") == {"tokenizer.json", "LICENSE", "manifest.json"}
    both = write_package(tmp_path, "both", "a", "b")
    given = ("--coreml", both, packages[0], "--output", tmp_path / "more")
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "both.mlpackage has 2 functions and is one of 2" in err
    given = ("--coreml", tmp_path / "lost", "--output", tmp_path / "more")
    status, _, err = run_command(main, capsys, *given)
    assert status == 2 and "lost is no package of ifp_mlx to-coreml" in err
