"""README.md of a bundle: what is in it, and what to do with it."""

from typing import Any

from .metadata import CORE, Part

CARD = """# {name} {version}

Parts of {base} for an app, made by ifp_mlx. Licence of the base model: {license}.
Needs {systems}.

| part | download | MB | asset pack |
|---|---|---|---|
{parts}

| task | instruction | kept | same token as the whole model |
|---|---|---|---|
{tasks}

`metadata.json` says the same to a program; `metadata.schema.json` says what its keys mean.

    sha256sum -c SHA256SUMS          # or: ifp_mlx bundle --verify .
    ifp_mlx bundle --take . {task} --output {task}    # one task as an ordinary folder

Asset packs, on a Mac with Xcode 26, from the folder around this one:

{packs}

In an app, with the Swift package in `swift`:

{swift}
Apple's packaging tool was not run on this bundle, nor was an app built with it.
"""
MLX = """    let bundle = try ModelBundle(folder: folder)         // where this folder is
    let model = BundleLanguageModel(bundle: bundle)      // iOS and macOS 27
    let session = LanguageModelSession(model: model, instructions: "{instruction}")
    session.prewarm()                                    // chooses the task, fetches, loads
    print(try await session.respond(to: "...").content)
"""
COREML = """    let bundle = try ModelBundle(folder: folder)         // where this folder is
    let configuration = MLModelConfiguration()
    configuration.functionName = bundle.metadata.tasks["{task}"]?.function
    // Compile core/model.mlpackage once, then MLModel(contentsOf:configuration:).
"""


def card_of(about: dict[str, Any], parts: list[Part]) -> str:
    """Return the README.md of a bundle.

    Args:
        about: the content of metadata.json.
        parts: of the bundle.
    """
    task, first = next(iter(about["tasks"].items()))
    swift = MLX if about["kind"] == "mlx" else COREML
    systems = (f"{system} {at}" for system, at in about["minimum_os"].items())
    return CARD.format(
        name=about["name"],
        version=about["version"],
        base=about["base_model"]["name"] or "a model",
        license=about["base_model"]["license"] or "unknown; ask before you pass it on",
        systems=" or ".join(systems),
        parts="\n".join(map(_part_row, parts)),
        tasks="\n".join(_task_row(*item) for item in about["tasks"].items()),
        packs="\n".join(_commands(about["name"], parts)),
        swift=swift.format(task=task, instruction=_cell(first["instruction"] or task)),
        task=task,
    )


def _part_row(part: Part) -> str:
    size = f"{part.bytes / 1e6:.1f}"
    return f"| {part.name} | {part.download} | {size} | `{part.asset_pack}` |"


def _task_row(name: str, task: dict[str, Any]) -> str:
    keep, agreement = (
        "unknown" if task[key] is None else f"{task[key]:.0%}"
        for key in ("keep", "agreement")
    )
    return f"| {name} | {_cell(task['instruction'] or '')} | {keep} | {agreement} |"


def _commands(bundle: str, parts: list[Part]) -> list[str]:
    names = ["metadata", CORE, *(part.name for part in parts if part.name != CORE)]
    return [
        f"    xcrun ba-package {bundle}/asset-packs/{name}.json -o {bundle}-{name}.aar"
        for name in names
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace('"', "'")
