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

# Arrows point one way: what each room may import of ours. What lies at the root is a
# command, or what commands share: only convert, whose scripts are commands, imports it.
BELOW: dict[str, set[str]] = {"files": set()}
BELOW["decoding"] = set()
BELOW["selection"] = {"files"}
BELOW["slicing"] = {"selection"}
BELOW["storage"] = {"files", "slicing"}
BELOW["checking"] = {"decoding", "selection", "slicing", "storage"}
BELOW["model"] = {"checking", "decoding", "files", "selection", "slicing", "storage"}
BELOW["engine"] = BELOW["model"] | {"model"}
BELOW["bundling"] = {"files", "selection", "slicing"}
BELOW["openai"] = {"decoding", "engine", "selection"}
BELOW["evaluation"] = {"checking", "files", "model"} | BELOW["checking"]
BELOW["planning"] = BELOW["evaluation"] | {"evaluation"}
BELOW["pictures"] = {"files", "evaluation", "selection"}
BELOW["training"] = BELOW["evaluation"] | {"evaluation"}
BELOW["terminal"] = {"engine", "files", "selection"}
BELOW["installation"] = {"files"}
BELOW["convert"] = {"cli", "files", "model", "selection", "slicing", "storage"}
# What one can type, and what those share.
ROOT_MODULES = {"__init__", "__main__", "cli", "llm_plugin"}
ROOT_MODULES |= {
    "benchmark",
    "bundle",
    "channel_store",
    "compact",
    "evaluate",
    "generate",
    "plan",
}
ROOT_MODULES |= {"sensitivity", "server", "tasks", "train", "visualize"}
ROOT_MODULES |= {"chat", "completion", "doctor"}
LATE = {"torch", "coremltools", "matplotlib", "transformers", "mlx_lm"}
LATE |= {"starlette", "uvicorn", "pydantic", "llguidance", "lm_eval"}
LATE |= {"prompt_toolkit", "shtab"}


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


def arrows_of(module: str) -> set[str]:
    """Return the modules of ours that a module imports, wherever in it."""
    home = ".".join(["ifp_mlx", *module.split(".")[:-1]])
    names = imports_of(ast.parse(OURS[module].read_text()), home)
    inside = [name.removeprefix("ifp_mlx.") for name in names if "ifp_mlx." in name]
    homes = {m for m in OURS for name in inside if f"{name}.".startswith(f"{m}.")}
    rooms = {name for name in inside if f"{name}.__init__" in OURS}
    return (homes | {f"{name}.__init__" for name in rooms}) - {module}


def test_the_root_is_what_one_can_type():
    assert {module for module in OURS if "." not in module} == ROOT_MODULES
    assert {module.split(".")[0] for module in OURS if "." in module} == {*BELOW}


@pytest.mark.parametrize("module", OURS)
def test_imports_point_one_way(module):
    names = imports_of(ast.parse(OURS[module].read_text()))
    assert not {name.split(".")[0] for name in names} & {"convert", "examples", "tests"}
    room = module.split(".")[0]
    if room in BELOW:
        rooms = {arrow.split(".")[0] for arrow in arrows_of(module)} - {room}
        assert rooms <= BELOW[room]


def test_no_modules_import_each_other_in_a_circle():
    left = {module: arrows_of(module) for module in OURS}
    while ends := {module for module, arrows in left.items() if not arrows & {*left}}:
        left = {m: arrows for m, arrows in left.items() if m not in ends}
    assert not left


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
def test_functions_fit_on_a_screen(path):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: length
        for node in ast.walk(ast.parse(path.read_text()))
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
