"""`fortwo report --html | --png | --pdf`: the server's page of a report as files. A browser that is installed makes
pictures and PDF."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fortwo import disk
from fortwo.cli.client import Client
from fortwo.errors import InvalidRequest, StorageFailed, Unavailable

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SECONDS = 120  # that the browser may take
WIDTH = 1040
TALLEST = 16_000  # pixels that Chromium draws in one picture
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# It notes how tall the page is, and how much of the window shows it. outerHeight may still be 0 then.
_MEASURE = """<script>document.documentElement.dataset.size =
[document.documentElement.scrollHeight, innerHeight].join()</script>"""


def is_job_id(name: str) -> bool:
    """Whether a name is the id of a job and not that of an adapter."""
    return _JOB_ID.fullmatch(name) is not None


def write_files(client: Client, name: str, files: Mapping[str, Path]) -> list[str]:
    """Write the report of an adapter, a version or a job. files: by html, png and pdf. The paths that were written.
    Raises InvalidRequest for a folder that does not exist and for a report that is too tall for a picture, Unavailable
    without a browser, StorageFailed."""
    missing = [str(file.parent) for file in files.values() if not file.parent.is_dir()]
    if missing:
        raise InvalidRequest(
            f"There is no folder {', '.join(missing)}.", param=next(iter(files)), hint="Create it, or name another one."
        )
    page = client.text(
        f"/api/training/jobs/{name}/report.html" if is_job_id(name) else f"/api/adapters/{name}/report.html"
    )
    drawn = {kind: file for kind, file in files.items() if kind != "html"}
    browser = _browser() if drawn else None
    for kind, file in files.items():
        content = page.encode() if browser is None or kind == "html" else _draw(browser, page, kind)
        try:
            disk.replace(file, content)
        except OSError as error:
            raise StorageFailed(
                f"{file} cannot be written: {error.strerror or error}",
                param=kind,
                hint="Name a file in another folder.",
            ) from None
    return [str(file) for file in files.values()]


def _browser() -> str:
    """The program that draws pages. Raises Unavailable if there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise Unavailable(
        "There is no browser on this machine that could draw the report.",
        hint="Install Chromium or Chrome, or write the report with --html and open it in any browser.",
    )


def _draw(browser: str, page: str, kind: str) -> bytes:
    """The page as png or pdf."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "report.html"), Path(folder, f"report.{kind}")
        source.write_text(page, "utf-8")
        if kind == "pdf":
            _run(browser, folder, "--no-pdf-header-footer", f"--print-to-pdf={target}", source.as_uri())
        else:
            if (height := _height(browser, page, folder)) > TALLEST:
                raise InvalidRequest(
                    f"The report is taller than the {TALLEST:,} pixels that one picture can have.",
                    param="png",
                    hint="Write it with --pdf or --html.",
                )
            _run(browser, folder, f"--window-size={WIDTH},{height}", f"--screenshot={target}", source.as_uri())
        try:
            return target.read_bytes()
        except OSError:
            raise Unavailable(
                f"{browser} wrote no {kind}.", hint="Write the report with --html and open it in a browser."
            ) from None


def _height(browser: str, page: str, folder: str) -> int:
    """How tall a window is that shows the whole page. Raises Unavailable if the browser does not say so."""
    measured = Path(folder, "measured.html")
    measured.write_text(page.replace("</body>", f"{_MEASURE}</body>"), "utf-8")
    window = 1000
    size = f"--window-size={WIDTH},{window}"
    printed = _run(browser, folder, size, "--dump-dom", measured.as_uri())
    if found := re.search(r'data-size="(\d+),(\d+)"', printed):
        return int(found[1]) + window - int(found[2])
    raise Unavailable(
        f"{browser} did not say how tall the report is.",
        hint="Try again, or write the report with --pdf or --html.",
    )


def _run(browser: str, profile: str, *options: str) -> str:
    """What the browser prints, without a window and with a profile of its own."""
    plain = ("--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}/profile")
    as_root = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium has no sandbox for root
    command = [browser, *plain, *as_root, *options]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(
            f"{browser} could not draw the report: {error}",
            hint="Write the report with --html and open it in a browser.",
        ) from None
