"""Fetches the libraries of the web page from the npm registry into src/fortwo/page/vendor, and axe-core for its tests.

.venv/bin/python scripts/vendor_page.py

Needs `npm`, which nothing else does. Each manifest.json lists versions, hashes and licences; `tests/test_page.py`
compares the files with it. The browser has no package names, so imports by name become imports by path.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "src/fortwo/page/vendor"
TESTS = ROOT / "tests/vendor"


@dataclass(frozen=True)
class Library:
    """files: path in the package to name in the folder. suffix: what makes an old-style script a module."""

    name: str
    version: str
    files: dict[str, str]
    licence_file: str = "LICENSE"
    suffix: str = ""


LIBRARIES = {
    PAGE: (
        Library("preact", "11.2.0", {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "hooks.js"}),
        Library("htm", "3.1.1", {"dist/htm.mjs": "htm.js"}),
        Library("@preact/signals", "2.11.4", {"dist/signals.mjs": "signals.js"}),
        Library("@preact/signals-core", "1.14.5", {"dist/signals-core.mjs": "signals-core.js"}),
        Library("marked", "18.2.1", {"lib/marked.esm.js": "marked.js"}),
        Library("dompurify", "3.5.0", {"dist/purify.es.mjs": "dompurify.js"}),
        Library(
            "uplot",
            "1.6.32",
            {"dist/uPlot.iife.min.js": "uplot.js", "dist/uPlot.min.css": "uplot.css"},
            suffix="\nexport default uPlot;\n",
        ),
    ),
    TESTS: (Library("axe-core", "4.14.1", {"axe.min.js": "axe.js"}),),
}
PATHS = {
    "preact": "./preact.js",
    "preact/hooks": "./hooks.js",
    "@preact/signals-core": "./signals-core.js",
}


def vendor(folder: Path, libraries: tuple[Library, ...]) -> None:
    """Write the libraries' files, licences and the manifest into an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "licenses").mkdir(parents=True)
    entries = [_fetch(library, folder) for library in libraries]
    (folder / "manifest.json").write_text(json.dumps({"libraries": entries}, indent=2) + "\n")


def _fetch(library: Library, folder: Path) -> dict[str, Any]:
    """Write one library; its entry of the manifest."""
    with tempfile.TemporaryDirectory() as place:
        packed = subprocess.run(
            ["npm", "pack", "--json", f"{library.name}@{library.version}"],
            cwd=place,
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(packed.stdout)
        about = next(iter(found.values() if isinstance(found, dict) else found))
        with tarfile.open(Path(place) / about["filename"]) as archive:
            archive.extractall(place, filter="data")
        package = Path(place) / "package"
        licence = json.loads((package / "package.json").read_text())["license"]
        text = f"licenses/{library.name.replace('/', '-').removeprefix('@')}.txt"
        (folder / text).write_bytes((package / library.licence_file).read_bytes())
        for source, target in library.files.items():
            (folder / target).write_text(_for_browsers((package / source).read_text(), target, library.suffix))
    return {
        "name": library.name,
        "version": library.version,
        "integrity": about["integrity"],
        "license": licence,
        "license_file": text,
        "sha256": {name: sha256(folder / name) for name in (*library.files.values(), text)},
    }


def _for_browsers(text: str, target: str, suffix: str) -> str:
    """Imports by path; no reference to a source map, which is not here."""
    text = re.sub(r"\n//# sourceMappingURL=\S*\s*$", "\n", text)
    if target.endswith(".js"):
        for name, path in PATHS.items():
            text = text.replace(f'from"{name}"', f'from"{path}"')
        text += suffix
    return text


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    for folder, libraries in LIBRARIES.items():
        vendor(folder, libraries)
