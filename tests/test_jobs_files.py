"""Uploaded files of a server that was killed while it stored one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fortwo.cli import app
from fortwo.errors import NotFound
from fortwo.hub.datasets import HubDatasets
from fortwo.jobs.files import FileStore
from fortwo.jobs.store import JobStore

KILLED = """
import os, sys
from pathlib import Path
from fortwo.hub.datasets import HubDatasets
from fortwo.jobs.files import FileStore
from fortwo.jobs.store import JobStore

home = Path(sys.argv[1])
files = FileStore(JobStore(f"sqlite:///{home / 'fortwo.db'}", "me"), home / "files", HubDatasets(home / "hub"))
with files.draft() as draft:
    (draft / "rows.jsonl").write_text("{}")
    files.add(draft / "rows.jsonl", "rows.jsonl", "fine-tune", also=lambda session, file: os._exit(9))
"""


def opened(home: Path) -> FileStore:
    return FileStore(JobStore(f"sqlite:///{home / 'fortwo.db'}", "me"), home / "files", HubDatasets(home / "hub"))


def upload(files: FileStore) -> str:
    with files.draft() as draft:
        (draft / "rows.jsonl").write_text("{}")
        return files.add(draft / "rows.jsonl", "rows.jsonl", "fine-tune").id


def test_the_content_of_a_file_without_a_row_goes_at_the_next_start(tmp_path: Path) -> None:
    kept = upload(opened(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    folders = {path.name for path in (tmp_path / "files").glob("file-*")}
    assert len(folders) == 2
    files = opened(tmp_path)
    files.clean()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept]
    assert files.path(kept).read_text() == "{}"
    with pytest.raises(NotFound):
        files.get((folders - {kept}).pop())


def test_files_that_a_lost_database_does_not_know_are_left_alone(tmp_path: Path) -> None:
    kept = upload(opened(tmp_path))
    (tmp_path / "fortwo.db").unlink()
    opened(tmp_path).clean()
    assert (tmp_path / "files" / kept / "rows.jsonl").read_text() == "{}"


def test_doctor_moves_them_aside_only_when_it_is_told_to(home: Path) -> None:
    home.mkdir()
    lost = upload(opened(home))
    (home / "fortwo.db").unlink()
    kept = upload(opened(home))
    for arguments, code in ((["--repair"], 1), (["--repair", "--apply"], 0), (["--repair"], 0)):
        result = CliRunner().invoke(app, ["doctor", *arguments])
        assert result.exit_code == code, result.output
        assert (lost in result.output) == (result.output.find("Nothing is wrong") < 0)
    assert (home / "files" / ".orphans" / lost / "rows.jsonl").read_text() == "{}"
    opened(home).clean()
    assert (home / "files" / ".orphans" / lost / "rows.jsonl").exists()
    assert opened(home).path(kept).read_text() == "{}"
