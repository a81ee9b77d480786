"""A picture of what a command printed, for the README.

make demo | .venv/bin/python scripts/picture.py docs/demo.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110
SGR = re.compile(r"\x1b\[[0-9;]*m")


def picture(text: str) -> str:
    """Terminal output as SVG: commands bold, the rest as it is."""
    console = Console(record=True, width=WIDTH, file=sys.stderr)
    for line in SGR.sub("", text).strip().splitlines():
        console.print(Text(line, style="bold green" if line.startswith("$ ") else ""))
    return console.export_svg(title="make demo")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(sys.stdin.read()))
