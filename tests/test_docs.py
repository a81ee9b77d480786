"""The pages that are generated are fresh, the commands that CI executes are found, every link leads somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from scripts import docs_site, pictures, readme, reference

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY"))]
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


def test_every_page_is_on_the_site_and_every_entry_is_a_page() -> None:
    def pages(entries: list[object]) -> list[str]:
        found: list[str] = []
        for entry in entries:
            assert isinstance(entry, dict)
            for target in entry.values():
                found += pages(target) if isinstance(target, list) else [target]
        return found

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_a_link_out_of_the_site_becomes_a_path() -> None:
    page = "[a.json](../examples/a.json), [ten facts](../examples/a.json), [data](guide-data.md)"
    changed = "`examples/a.json`, ten facts (`examples/a.json`), [data](guide-data.md)"
    assert docs_site.on_page_markdown(page.replace("[a.json]", "[examples/a.json]")) == changed


def test_a_recording_shows_each_line_when_it_came() -> None:
    shell = shutil.which("bash")
    assert shell is not None
    lines = pictures.record([shell, "-c", "echo '$ first'; sleep 0.2; printf 'drawn over\\rsecond\\n'; echo '<third>'"])
    assert [line for _, line in lines] == ["$ first", "second", "<third>"]
    assert lines[0][0] < lines[1][0] <= lines[2][0]
    svg = pictures.recording(lines, "a title")
    times = [float(found) for found in re.findall(r"animation:appear .2s ([0-9.]+)s", svg)]
    assert times == sorted(times)
    assert times[-1] == pictures.SECONDS
    assert "<third>" not in svg
    assert "a&#160;title" in svg or "a title" in svg
