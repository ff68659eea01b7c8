"""The shape of the house: which way imports go, how large rooms are, what is in them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ifp_mlx"
MODULES = sorted(
    path
    for room in ("ifp_mlx", "convert", "examples")
    for path in ROOT.glob(f"{room}/**/*.py")
)
IDS = [str(path.relative_to(ROOT)) for path in MODULES]

# Arrows point one way: what each module may import of ours, beside atomic. Who is not
# listed (train, evaluate, server, ...) is a verb on top, and may import any of these.
NOTHING: set[str] = set()
MAY_IMPORT = {
    "atomic": NOTHING,
    "config": NOTHING,
    "companions": NOTHING,
    "masks": NOTHING,
    "predictor": NOTHING,
    "data": NOTHING,
    "pruning": {"masks"},
    "selectors": {"masks", "pruning"},
    "store": {"masks", "pruning", "channel_store.layout", "channel_store.reader"}
    | {"channel_store.tensors"},
    "channel_store.layout": NOTHING,
    "channel_store.tensors": NOTHING,
    "channel_store.device": {"caches"},
    "channel_store.arriving": {"pruning", "channel_store.layout"},
    "channel_store.reader": {"pruning", "channel_store.layout", "channel_store.device"}
    | {"channel_store.arriving"},
    "footprint": {"masks", "pruning"},
    "planning.devices": NOTHING,
    "planning.machine": {"caches", "planning.devices"},
    "planning.roofline": {"footprint", "planning.devices", "pruning"},
    "tables": NOTHING,
    "runners": {"dense_prefill", "masks", "model"},
    "model": {"masks", "predictor", "data", "pruning", "selectors", "store"}
    | {"choice", "config", "sweep"},
    "choice": {"config", "masks", "selectors"},
    "sweep": {"compensation", "masks", "pruning", "selectors", "store"},
    "cli": {"masks", "selectors", "store"},
    "compensation": {"pruning"},
    "serving.errors": NOTHING,
    "serving.events": NOTHING,
    "serving.worker": {"serving.errors"},
    "serving.requests": {"data", "masks", "selectors", "serving.errors"},
    "serving.lanes": {"masks", "serving.errors", "serving.events"}
    | {"serving.requests", "serving.worker"},
    "caches": NOTHING,
    "plotting": NOTHING,
    "compact_cache": {"caches", "choice", "masks", "model", "pruning", "store"},
    "fit": {"choice", "compact_cache", "data", "footprint", "masks", "model"}
    | {"selectors"},
    "dense_prefill": {"model", "selectors"},
    "responses": {"masks"},
    "generate": {"masks", "data", "selectors", "model", "cli", "compact_cache", "fit"}
    | {"choice", "dense_prefill", "responses"},
    "compact": {"masks", "data", "pruning", "selectors", "companions", "model", "cli"}
    | {"requantisation"},
    "__init__": {"masks", "model", "generate", "responses"},
}
# Who may take parts out of a room of the package.
ENTRANCES = {"engine", "evaluate", "plan", "server", "store", "train", "visualize"}
LATE = {"torch", "coremltools", "matplotlib", "transformers", "mlx_lm"}
LATE |= {"starlette", "uvicorn", "llguidance", "lm_eval"}


def imports_of(tree: ast.AST, home: str = "ifp_mlx") -> set[str]:
    """Return the dotted names of all imports of a module in the package ``home``;
    ours start with ``ifp_mlx``.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = home.split(".")[: 1 - node.level or None] if node.level else []
            path = [*up, node.module] if node.module else up
            names |= {".".join([*path, alias.name]) for alias in node.names}
    return names


def name_of(path: Path) -> str:
    """Return a module's dotted name inside the package: ``masks``, ``serving.lanes``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


OURS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", OURS)
def test_imports_point_one_way(module):
    home = ".".join(["ifp_mlx", *module.split(".")[:-1]])
    names = imports_of(ast.parse(OURS[module].read_text()), home)
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"convert", "examples", "tests"}
    inside = [name.removeprefix("ifp_mlx.") for name in names if "ifp_mlx." in name]
    used = {m for m in OURS for name in inside if f"{name}.".startswith(f"{m}.")}
    if module in MAY_IMPORT:
        assert used <= MAY_IMPORT[module] | {"atomic"}
    if "." not in module:  # only what is built of a room's parts goes into it
        rooms = {name.split(".")[0] for name in used if "." in name}
        assert not rooms or module in ENTRANCES


def test_the_import_checker_sees_every_spelling():
    code = "import ifp_mlx.a\nfrom ifp_mlx import b\nfrom . import c\nfrom .d import e"
    names = imports_of(
        ast.parse(f"def f():\n    {code.replace(chr(10), chr(10) + '    ')}")
    )
    assert names == {"ifp_mlx.a", "ifp_mlx.b", "ifp_mlx.c", "ifp_mlx.d.e"}


def test_importing_the_package_is_quick_and_silent():
    code = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import ifp_mlx\n"
        "for name in getattr(ifp_mlx, '__all__', []): getattr(ifp_mlx, name)\n"
        "assert dict(os.environ) == before\n"
        f"assert not {LATE} & set(sys.modules), {LATE} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions)
        and (length := node.end_lineno - node.lineno + 1) > 70
    }
    assert not long


def test_calibration_text_is_well_formed_chats():
    lines = (PACKAGE / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    for chat in chats:
        assert all(set(m) == {"role", "content"} and m["content"].strip() for m in chat)
        roles = [message["role"] for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) != []
    words = sum(len(m["content"].split()) for chat in chats for m in chat)
    assert len({str(chat) for chat in chats}) == len(chats) > 30
    assert 4500 <= words <= 5500
