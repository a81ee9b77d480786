"""The files of the web page, without a browser: how they are served, where they are from, and how large they are."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.server.page import FOLDER, HEADERS

TESTS = Path(__file__).parent
OWN = [file for file in sorted(FOLDER.rglob("*")) if file.is_file() and FOLDER / "vendor" not in file.parents]
SCRIPTS = [file for file in OWN if file.suffix == ".js"]
IMPORT = re.compile(r'(?:from\s*|import\s*\(?\s*)["\']([\w./@-]+)["\']')
FIRST_PAINT_BYTES = 150_000


def imports(file: Path, *, lazy: bool = False) -> list[Path]:
    """What a module imports at once, or also what it imports later."""
    found = IMPORT.finditer(re.sub(r"/\*.*?\*/", "", file.read_text(), flags=re.DOTALL))
    return [(file.parent / one[1]).resolve() for one in found if lazy or "(" not in one[0]]


def first_paint() -> set[Path]:
    """The page, what it names, and every module that those import."""
    named = re.findall(r'(?:href|src)="/page/([^"]+)"', (FOLDER / "index.html").read_text())
    found, todo = {FOLDER / "index.html"}, [FOLDER / name for name in named]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imports(file) if file.suffix == ".js" else []
    return found


def test_the_page_and_its_files_are_served_with_a_strict_policy(served: Served) -> None:
    for path in ("/", *(f"/page/{file.relative_to(FOLDER).as_posix()}" for file in OWN)):
        response = served.http.get(path)
        assert response.status_code == 200, path
        assert {name: response.headers[name] for name in HEADERS} == HEADERS, path
    assert served.http.get("/").headers["content-type"].startswith("text/html")
    assert "javascript" in served.http.get("/page/app.js").headers["content-type"]
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["default-src"] == "'self'"


def test_a_file_that_has_not_changed_is_not_sent_again(served: Served) -> None:
    tag = served.http.get("/page/app.js").headers["etag"]
    assert served.http.get("/page/app.js", headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/", "/page/../app.py", "/page/%2E%2E/app.py"])
def test_nothing_else_is_served(served: Served, path: str) -> None:
    refused(served.http.get(path), 404, "unknown_path")


def test_with_a_key_the_page_is_open_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="s3cret")) as guarded:
        for path in ("/", "/page/app.js", "/page/vendor/preact.js"):
            assert guarded.http.get(path).status_code == 200
        for path in ("/page", "/pages", "/api/models"):
            refused(guarded.http.get(path), 401, "invalid_api_key")


@pytest.mark.parametrize("folder", [FOLDER / "vendor", TESTS / "vendor"], ids=["page", "tests"])
def test_libraries_are_those_of_the_manifest(folder: Path) -> None:
    libraries = json.loads((folder / "manifest.json").read_text())["libraries"]
    hashes = {folder / name: sha256 for one in libraries for name, sha256 in one["sha256"].items()}
    there = {file for file in folder.rglob("*") if file.is_file()} - {folder / "manifest.json"}
    assert there == hashes.keys()
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in there} == hashes
    for one in libraries:
        assert one["version"]
        assert one["license"]
        assert one["license_file"] in one["sha256"]


def test_no_file_names_another_machine() -> None:
    for file in OWN:
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", file.read_text())) - {"http://www.w3.org"}
        assert not found, file
    for file in (FOLDER / "vendor").glob("*.*s"):
        assert not re.search(r"(?:import|from|url)\W{0,3}(?:https?:)?//", file.read_text()), file


def test_every_import_leads_to_a_file() -> None:
    for file in (*SCRIPTS, *(FOLDER / "vendor").glob("*.js")):
        assert [one for one in imports(file, lazy=file in SCRIPTS) if not one.is_file()] == [], file
    assert {file for file in SCRIPTS if file not in first_paint()} <= {FOLDER / "markdown.js", FOLDER / "chart.js"}


def test_what_is_loaded_before_the_first_paint_is_small() -> None:
    size = sum(len(gzip.compress(file.read_bytes())) for file in first_paint())
    assert size <= FIRST_PAINT_BYTES, f"{size:,} bytes"


def test_every_text_is_in_the_table() -> None:
    """What the views write in letters, outside of ${...}, is no text of a language."""
    for file in SCRIPTS:
        for template in re.findall(r"html`(.*?)`", file.read_text(), re.DOTALL):
            bare = re.sub(r"<[^>]*>", "", re.sub(r"\$\{[^{}]*\}", "", template))
            assert "{" in bare or not re.search(r"[A-Za-z]{3,}", bare), (file.name, bare)
