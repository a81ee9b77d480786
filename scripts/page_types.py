"""Checks the types of the web page, and writes types/api.d.ts from the OpenAPI document. With --check it only compares.

Needs npm, which fetches the pinned TypeScript and openapi-typescript once; without it nothing is checked, and that is
said. The compiler sees copies of the page's files beside the types of its libraries, which are in types/vendor.

The options are TypeScript's strict ones but for noImplicitAny: the compiler does not see what a template gives to a
component, so types of components' properties would be checked nowhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fortwo.server.app import create_app
from fortwo.server.state import AppState
from fortwo.settings import Settings

ROOT = Path(__file__).parent.parent
TYPES = ROOT / "types"
API = TYPES / "api.d.ts"
PAGE = ROOT / "src" / "fortwo" / "page"


def main(check: bool) -> int:
    """The exit status: 0 if the page's types are right, or cannot be checked here."""
    if shutil.which("npm") is None:
        print("skipped: the page's types are not checked, because npm is not installed")
        return 0
    if not (TYPES / "node_modules" / ".bin" / "tsc").exists():
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=TYPES, check=True)
    written = api_types()
    if not check:
        API.write_text(written)
    elif API.read_text() != written:
        print(f"{API.relative_to(ROOT)} is stale: run python scripts/page_types.py")
        return 1
    return compile_page()


def document() -> str:
    """The OpenAPI document of a server, with the schemas alone: the paths repeat every error."""
    with tempfile.TemporaryDirectory() as home:
        state = AppState(Settings.model_validate({"home": home, "port": 0}))
        try:
            return json.dumps(create_app(state).openapi() | {"paths": {}})
        finally:
            state.close()


def api_types() -> str:
    """What api.d.ts has to be."""
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "openapi.json", Path(place) / "api.d.ts"
        source.write_text(document())
        tool = TYPES / "node_modules" / ".bin" / "openapi-typescript"
        subprocess.run([tool, source, "--output", target], cwd=TYPES, check=True, capture_output=True)
        return target.read_text()


def compile_page() -> int:
    """Run the compiler on copies; its exit status."""
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / PAGE.relative_to(ROOT)
        shutil.copytree(PAGE, page, ignore=shutil.ignore_patterns("vendor"))
        shutil.copytree(TYPES / "vendor", page / "vendor")
        (Path(place) / "types").mkdir()
        for file in (API, TYPES / "tsconfig.json"):
            shutil.copy(file, Path(place) / "types")
        compiler = TYPES / "node_modules" / ".bin" / "tsc"
        return subprocess.run([compiler, "--project", "types"], cwd=place, check=False).returncode


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
