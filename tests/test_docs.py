"""The pages that are generated are fresh, the commands that CI executes are found, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import readme, reference

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def test_reference_is_fresh() -> None:
    assert reference.PAGE.read_text() == reference.page(), "make docs"


def test_only_marked_blocks_are_executed() -> None:
    text = "```bash run\nmake demo\n```\ntext\n```bash\nrm -rf /\n```\n```bash run\nmake stop\n```\n"
    assert readme.commands(text) == "make demo\n\nmake stop\n"


def test_the_readme_has_the_demo_and_the_three_calls_executed() -> None:
    script = readme.commands((ROOT / "README.md").read_text())
    for call in ("make demo", "/api/training/start", "/load", "/v1/chat/completions"):
        assert call in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_share_a_shell_a_home_and_a_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    page = tmp_path / "page.md"
    page.write_text(
        f"```bash run\nport=5001\n```\n\n```bash run\necho $port $FORTWO_PORT > {out}; test -d $FORTWO_HOME\n```\n"
    )
    assert readme.main(page) == 0
    port, setting = out.read_text().split()
    assert port == setting != "5001"


def test_a_command_that_fails_fails_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(f"```bash run\nfalse | true\ntouch {tmp_path / 'reached'}\n```\n")
    assert readme.main(page) != 0
    assert not (tmp_path / "reached").exists()
    page.write_text("no commands\n")
    assert readme.main(page) != 0
