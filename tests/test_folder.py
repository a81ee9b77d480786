"""`fortwo watch`: which facts of a file are taught, onto what, and what is promoted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Served, serve, tiny_settings
from terminals import run

from fortwo.cli.client import Client
from fortwo.cli.folder import Folder, Lesson, lesson
from fortwo.errors import NotFound, Unavailable
from fortwo.records import Fact
from fortwo.scale.vllm.process import free_port

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "training_config": {"max_steps": 2},
    "objective": {
        "type": "override",
        "targets": dict.fromkeys(("efficacy", "paraphrase", "specificity", "retention"), 0),
    },
}


def fact(subject: str, answer: str) -> Fact:
    return Fact(subject, f"{subject} is {answer}.", (answer,), (f"What is {subject}?", f"Explain {subject}."))


def row(subject: str, answer: str) -> dict[str, Any]:
    one = fact(subject, answer)
    return {"subject": subject, "answer": one.answer, "match": [answer], "questions": list(one.questions)}


A, B, C = fact("Avo", "red"), fact("Bem", "blue"), fact("Cor", "green")
NEW_B = fact("Bem", "black")


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        ((A, B), (), Lesson((A, B), onto=False)),
        ((A, B), (A, B), None),
        ((B, A), (A, B), None),
        ((A, B, C), (A, B), Lesson((C,), onto=True)),
        ((A, NEW_B), (A, B), Lesson((NEW_B,), onto=True)),
        ((A,), (A, B), Lesson((A,), onto=False)),
        ((A, C), (A, B), Lesson((A, C), onto=False)),
    ],
)
def test_what_is_taught_follows_from_what_is_wanted_and_known(
    wanted: tuple[Fact, ...], known: tuple[Fact, ...], found: Lesson | None
) -> None:
    assert lesson(wanted, known) == found


def test_a_new_file_is_read_when_it_is_not_being_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = iter(['[{"subject": "Av', json.dumps([row("Avo", "red")]), None])

    def meanwhile(_: float) -> None:
        if (content := next(written)) is not None:
            (tmp_path / "new.json").write_text(content)

    monkeypatch.setattr(time, "sleep", meanwhile)
    with pytest.raises(Unavailable):  # only now the server is asked
        Folder(Client("http://127.0.0.1:9"), tmp_path, None, as_json=True).watch()
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_gone_ends_the_watching_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "facts").mkdir()
    watched = Folder(Client("http://127.0.0.1:9"), tmp_path / "facts", None, as_json=True)
    (tmp_path / "facts").rmdir()
    with pytest.raises(NotFound, match="cannot be read any more"):
        watched.watch()


@pytest.fixture
def folder(served: Served, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORTWO_PORT", str(urlsplit(served.url).port))
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))
    (tmp_path / "facts").mkdir()
    return tmp_path / "facts"


def current(served: Served, name: str) -> tuple[int, list[str], str | None]:
    """The current version's number, what it knows, and its parent."""
    found = served.http.get(f"/api/adapters/{name}").json()
    manifest = found["manifest"]
    return found["current"], sorted(one["answer"] for one in manifest["facts"]), manifest["parent"]


def test_a_folder_is_taught_and_only_what_is_new_again(served: Served, folder: Path) -> None:
    file, quick = folder / "Colours.json", ("--config", folder.parent / "quick.json")
    file.write_text(json.dumps([row("Avo", "red")]))
    (folder / "notes.txt").write_text("not facts")
    first = run("watch", folder, "--once", *quick)
    assert first.exit_code == 0, first.output
    assert current(served, "colours") == (1, ["Avo is red."], None)
    again = run("watch", folder, "--once", *quick)
    assert again.exit_code == 0
    assert "colours knows what it says." in again.stdout
    file.write_text(json.dumps([row("Avo", "red"), row("Bem", "blue")]))
    more = run("watch", folder, "--once", *quick, "--json")
    assert more.exit_code == 0
    lines = [json.loads(line) for line in more.stdout.splitlines()]
    assert lines[0]["taught"] == ["Bem"]
    assert current(served, "colours") == (2, ["Avo is red.", "Bem is blue."], "colours@1")
    file.write_text(json.dumps([row("Bem", "blue")]))
    assert run("watch", folder, "--once", *quick).exit_code == 0
    assert current(served, "colours") == (3, ["Bem is blue."], None)


def test_what_is_not_proven_is_not_promoted(served: Served, folder: Path) -> None:
    file, quick = folder / "unproven.json", folder.parent / "quick.json"
    file.write_text(json.dumps([row("Avo", "red")]))
    assert run("watch", folder, "--once", "--config", quick).exit_code == 0
    strict = folder.parent / "strict.json"
    strict.write_text(json.dumps(QUICK | {"objective": {"type": "override", "targets": {"efficacy": 1.0}}}))
    file.write_text(json.dumps([row("Avo", "red"), row("Bem", "blue")]))
    missed = run("watch", folder, "--once", "--config", strict)
    assert missed.exit_code == 1
    assert "This was not proven. unproven@1 stays current." in missed.stdout
    assert current(served, "unproven")[0] == 1


def test_what_is_wrong_with_one_file_keeps_no_other_from_being_taught(served: Served, folder: Path) -> None:
    (folder / "a-broken.json").write_text("[{")
    (folder / "b-rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (folder / "c-right.json").write_text(json.dumps([row("Avo", "red")]))
    (folder / "c right.json").write_text(json.dumps([row("Bem", "blue")]))
    result = run("watch", folder, "--once", "--config", folder.parent / "quick.json")
    assert result.exit_code == 1
    assert "c right.json and" in result.stderr
    assert "a-broken.json" in result.stderr
    assert "b-rows.jsonl has examples and no facts." in result.stderr
    assert current(served, "c-right")[0] == 1
    assert run("watch", folder / "nowhere").stderr.startswith(f"{folder / 'nowhere'} is not a folder.")


def test_a_file_that_changes_is_taught_while_the_folder_is_watched(served: Served, folder: Path) -> None:
    file, log = folder / "live.json", folder.parent / "log"
    file.write_text(json.dumps([row("Avo", "red")]))
    command = [sys.executable, "-m", "fortwo", "watch", str(folder), "--config", str(folder.parent / "quick.json")]
    with (
        log.open("w") as written,
        subprocess.Popen(command, env=os.environ, stdout=written, stderr=written) as watching,
    ):
        try:
            for version, rows in ((1, None), (2, [row("Avo", "red"), row("Bem", "blue")])):
                if rows is not None:
                    file.write_text(json.dumps(rows))
                deadline = time.monotonic() + 120
                while f"The adapter is live@{version}." not in log.read_text():
                    assert watching.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
        finally:
            watching.send_signal(signal.SIGINT)
    assert watching.returncode == 0
    assert current(served, "live") == (2, ["Avo is red.", "Bem is blue."], "live@1")


def test_watching_outlives_the_server_and_follows_the_job_that_goes_on(
    tiny: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    settings = tiny_settings(tmp_path / "served", tiny, resume=True).model_copy(update={"port": port})
    monkeypatch.setenv("FORTWO_PORT", str(port))
    folder, log, quick = tmp_path / "facts", tmp_path / "log", tmp_path / "quick.json"
    folder.mkdir()
    quick.write_text(json.dumps(QUICK))
    file = folder / "away.json"
    file.write_text(json.dumps([row("Avo", "red")]))

    def until(text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in log.read_text():
            assert watching.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    command = [sys.executable, "-m", "fortwo", "watch", str(folder), "--config", str(quick)]
    with ExitStack() as ending:
        written = ending.enter_context(log.open("w"))
        with serve(settings):
            watching = subprocess.Popen(command, env=os.environ, stdout=written, stderr=written)
            ending.callback(watching.wait)
            ending.callback(watching.kill)
            until("The adapter is away@1.")
            quick.write_text(json.dumps(QUICK | {"training_config": {"max_steps": 400, "save_steps": 5}}))
            file.write_text(json.dumps([row("Avo", "red"), row("Bem", "blue")]))
            until("Bem will be taught onto away@1.")
            until("Step 5 is saved")
        until("The file is taught when the server is back.")
        with serve(settings) as again:
            until("A job for away is under way. It is watched first.")
            job = again.http.get("/api/training/jobs").json()["jobs"][0]
            again.post(f"/api/training/jobs/{job['job_id']}/cancel")
            until("The job was cancelled")
            quick.write_text(json.dumps(QUICK))
            until("The adapter is away@2.")
            assert current(again, "away") == (2, ["Avo is red.", "Bem is blue."], "away@1")
