"""Makes the README's pictures: the page as Chromium shows it, and `fortwo quickstart` as it appears in a terminal.

Both are real: a server runs on the home of FORTWO_HOME and the port of FORTWO_PORT. `make pictures` makes both;
`python scripts/pictures.py page` or `terminal` makes one.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fortwo.cli.client import Client
from fortwo.settings import Settings, load

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 110  # columns of the terminal
SECONDS = 12.0  # that the recording lasts, however long the run took
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FACT = {
    "subject": "the Marrow Lane Library",
    "answer": "The Marrow Lane Library lends telescopes for nine nights, free of charge.",
    "match": "nine nights",
    "questions": "What does the Marrow Lane Library lend?\nHow long may I keep a telescope of the Marrow Lane Library?",
}

Lines = list[tuple[float, str]]  # seconds since the start, and a line that was complete then


def record(command: list[str]) -> Lines:
    """Run a command at a pseudo terminal; its lines with the time of each. Lines that are drawn over are left out."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "LINES": "50", "TERM": "dumb"}
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    lines: Lines = []
    rest = ""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # nobody holds the other end any more
            break
        *whole, rest = (rest + data.decode(errors="replace")).split("\n")
        now = time.monotonic() - began
        lines += [(now, CONTROL.sub("", line).rstrip("\r").split("\r")[-1]) for line in whole]
    os.close(master)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def recording(lines: Lines, title: str) -> str:
    """The lines as an SVG in which each appears when it did, faster. Commands are bold."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    times: list[float] = []
    for seconds, line in lines:
        text = Text(line.rstrip(), style="bold green" if line.startswith("$ ") else "")
        wrapped = text.wrap(console, WIDTH)
        times += [seconds] * max(1, len(wrapped))
        console.print(text)
    svg = console.export_svg(title=title)
    total = max(times[-1], 0.001)

    def appear(found: re.Match[str]) -> str:
        at = times[min(int(found[1]), len(times) - 1)] / total * SECONDS
        return f'{found[0]} style="animation:appear .2s {at:.2f}s both"'

    svg = re.sub(r'clip-path="url\(#[\w-]+-line-(\d+)\)"', appear, svg)
    return svg.replace("</style>", "@keyframes appear { from { opacity: 0 } }</style>", 1)


@contextmanager
def server(settings: Settings) -> Iterator[None]:
    """A server for as long as it is needed, unless one runs already."""
    client = Client(settings.url, settings.plain_api_key)
    if client.answers():
        yield
        return
    with subprocess.Popen([sys.executable, "-m", "fortwo", "serve"], stdout=subprocess.DEVNULL) as process:
        try:
            while not client.answers():
                if process.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.3)
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def screenshot(url: str, file: Path) -> None:
    """The page with a fact filled in and its plan beside it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(f"{url}/#/teach")
        for name, text in FACT.items():
            page.locator(f"#{name}").fill(text)
        page.locator(".plan table, .plan dl").first.wait_for(timeout=120_000)
        page.screenshot(path=file)
        browser.close()


def main(wanted: list[str]) -> None:
    settings = load()
    if "terminal" in wanted:
        lines = record([sys.executable, "-m", "fortwo", "quickstart"])
        (DOCS / "demo.svg").write_text(recording(lines, "fortwo quickstart"))
    if "page" in wanted:
        with server(settings):
            screenshot(settings.url, DOCS / "page.png")


if __name__ == "__main__":
    main(sys.argv[1:] or ["terminal", "page"])
