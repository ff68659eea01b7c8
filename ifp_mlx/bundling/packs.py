"""Manifests of Background Assets: which files Apple's packaging tool puts together.

Keys and values are those of Apple's documentation ("Creating managed asset packs") and of
the template that ``xcrun ba-package template`` writes; the tool itself was not run.
"""

import json
from pathlib import Path
from typing import Any

from .metadata import METADATA, Download, Part

FOLDER = "asset-packs"
PLATFORMS = ["iOS", "macOS"]
# At both events, so that an app's update never finds an old core.
EVENTS = ["firstInstallation", "subsequentUpdate"]


def pack_id(bundle: str, part: str) -> str:
    """Return the ID of a part's asset pack."""
    return f"{bundle}-{part}"


def write_manifests(folder: Path, bundle: str, parts: list[Part]) -> None:
    """Write a manifest for every part, and one for metadata.json.

    The metadata has a pack of its own, of a few kilobytes: adding a task changes it,
    and must not make every device fetch the core again.

    Args:
        folder: the bundle's; manifests go to ``asset-packs`` in it. The paths in them
            begin with the bundle's name, since the tool runs in the folder around it,
            and all packs of an app share one root.
        bundle: its name.
        parts: of it.
    """
    (folder / FOLDER).mkdir()
    about = [{"file": f"{bundle}/{METADATA}"}]
    _write(folder, _manifest(bundle, "essential", about), "metadata")
    for part in parts:
        files = [{"directory": f"{bundle}/{part.folder}"}]
        _write(folder, _manifest(part.asset_pack, part.download, files), part.name)


def _manifest(
    pack: str, download: Download, selectors: list[dict[str, str]]
) -> dict[str, Any]:
    when = {} if download == "onDemand" else {"installationEventTypes": EVENTS}
    return {
        "assetPackID": pack,
        "downloadPolicy": {download: when},
        "fileSelectors": selectors,
        "platforms": PLATFORMS,
    }


def _write(folder: Path, manifest: dict[str, Any], name: str) -> None:
    text = json.dumps(manifest, indent=2)
    (folder / FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
