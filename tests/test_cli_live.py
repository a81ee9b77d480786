"""The command line against a real server with a tiny base: teaching in words, JSON, exit statuses, chat, pipes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Served
from terminals import Terminal, run
from typer.main import get_command

import fortwo.cli
from fortwo.cli import app

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {
    "training_config": {"max_steps": 2},
    "objective": {"type": "override", "targets": {"efficacy": 0, "paraphrase": 0, "specificity": 0, "retention": 0}},
}
FACT = ("the Marrow Lane Library", "The Marrow Lane Library lends telescopes for 9 nights.")


@pytest.fixture
def here(served: Served, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The settings with which the command line reaches the server; they are set for this process too."""
    settings = {
        "FORTWO_HOME": str(served.state.settings.home),
        "FORTWO_PORT": str(urlsplit(served.url).port),
        "FORTWO_DEFAULT_MODEL": "tiny",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A configuration of two steps, with targets that anything meets."""
    file = tmp_path / "quick.json"
    file.write_text(json.dumps(QUICK))
    return file


@pytest.fixture
def missed(tmp_path: Path) -> Path:
    """A configuration of two steps, with a target that a random model misses."""
    file = tmp_path / "missed.json"
    objective = {"type": "override", "targets": {"efficacy": 1.0}}
    file.write_text(json.dumps(QUICK | {"objective": objective}))
    return file


@pytest.fixture
def taught(here: Mapping[str, str], quick: Path) -> str:
    """An adapter that was taught by two strings."""
    if run("adapters", "show", "taught").exit_code:
        assert run("teach", *FACT, "--name", "taught", "--config", quick).exit_code == 0
    return "taught"


def test_a_fact_in_two_strings_is_taught_and_judged_in_words(here: Mapping[str, str], quick: Path) -> None:
    result = run("teach", *FACT, "--config", quick)
    assert result.exit_code == 0, result.output
    assert "Plan: the-marrow-lane-library on tiny: override" in result.output
    assert "It has learned this: every target was met." in result.output
    manifest = json.loads(run("adapters", "show", "the-marrow-lane-library").output)["manifest"]
    (fact,) = manifest["facts"]
    assert fact["subject"] == FACT[0]
    assert fact["match"] == ["9 nights"]
    assert "What is the Marrow Lane Library?" in fact["questions"]


def test_what_is_said_of_a_fact_is_what_is_taught(here: Mapping[str, str]) -> None:
    words = ("--question", "What do they lend?", "--question", "Which library?", "--match", "telescopes")
    more = ("--alias", "Marrow", "--held-out", "And there?", "--neighbor", "What is 1?", "--control", "Hello!")
    result = run("teach", *FACT, *words, *more, "--name", "said", "--detach", "--json")
    assert result.exit_code == 0, result.output
    job = json.loads(result.output)
    run("jobs", "cancel", job["job_id"])
    plan = json.loads(run("plan", *FACT, *words, *more, "--json").output)
    assert plan["computed"]["rows"] == 2
    assert {one["name"] for one in plan["settings"]} == {one["name"] for one in job["plan"]["settings"]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere.json", "--name", "x"), "there is no file 'nowhere.json'"),
        (("42",), 'fortwo teach "42" "ANSWER"'),
        ((" ", "an answer", "--name", "x"), "The subject is empty."),
        (("42", ""), "The answer is empty."),
        (("何", "an answer"), "Give one with --name."),
        (("42", "--question", "What?", "--match", "two"), "questions, match belong to a fact in words"),
        ((".", "--name", "x"), "fortwo watch ."),
    ],
)
def test_what_cannot_be_taught_is_refused_with_the_remedy(
    here: Mapping[str, str], words: tuple[str, ...], told: str
) -> None:
    result = run("teach", *words)
    assert result.exit_code == 1
    assert told.casefold() in " ".join(result.stderr.split()).casefold()


def test_a_file_with_an_answer_is_refused(here: Mapping[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    result = run("teach", rows, "mine")
    assert result.exit_code == 1
    assert "is a file, and 'mine' is given as the answer" in result.stderr
    assert run("teach", rows).stderr.startswith("The adapter has no name.")


def test_a_person_at_a_terminal_is_asked_behind_the_plan(here: Mapping[str, str], quick: Path) -> None:
    words = ("teach", *FACT, "--name", "asked", "--config", str(quick))
    declined = Terminal(*words, env=here)
    declined.wait_for("Start? [Y/n]")
    assert "Plan: asked on tiny" in declined.shown
    declined.type("n\n")
    assert declined.end() == 1
    assert run("adapters", "show", "asked").exit_code == 1
    agreed = Terminal(*words, env=here)
    agreed.wait_for("Start? [Y/n]")
    agreed.type("\n")
    assert agreed.end() == 0
    unasked = Terminal(*words, "--yes", env=here)
    assert unasked.end() == 0
    assert "Start?" not in unasked.shown
    assert "asked@2" in unasked.shown


def test_exit_statuses(here: Mapping[str, str], missed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = run("teach", *FACT, "--name", "exits", "--config", missed)
    assert failed.exit_code == 1
    assert "It has not learned enough: efficacy is 0 % of at least 100 %" in failed.output
    assert "chat --model exits@1" in failed.output
    assert run("adapters", "show", "nobody").exit_code == 1
    assert run("adapters", "show").exit_code == 2
    assert run("jobs", "list", "--unknown").exit_code == 2
    monkeypatch.setenv("FORTWO_PORT", "9")
    assert run("jobs", "list").exit_code == 1


def test_events_are_json_lines_and_the_job_is_the_last(here: Mapping[str, str], quick: Path) -> None:
    result = run("teach", *FACT, "--name", "lines", "--config", quick, "--json")
    assert result.exit_code == 0
    *events, job = map(json.loads, result.stdout.splitlines())
    assert [event["data"]["step"] for event in events if event["type"] == "step"] == [1, 2]
    assert job["status"] == "succeeded"
    again = run("jobs", "watch", job["job_id"], "--json")
    assert again.exit_code == 0
    assert again.stdout == result.stdout
    shown = json.loads(run("jobs", "show", job["job_id"], "--json").stdout)
    assert shown == job
    assert "It has learned this" in run("jobs", "watch", job["job_id"]).stdout


def test_watch_without_an_id_takes_the_job_that_runs_or_runs_next(here: Mapping[str, str], quick: Path) -> None:
    none = run("jobs", "watch", "--json")
    assert none.exit_code == 1
    assert json.loads(none.stdout)["error"]["hint"] == "List all jobs with: fortwo jobs list"
    started = json.loads(run("teach", *FACT, "--name", "next", "--config", quick, "--detach", "--json").stdout)
    watched = run("jobs", "watch", "--json")
    if watched.exit_code == 0:  # it may have ended before it was watched
        assert json.loads(watched.stdout.splitlines()[-1])["job_id"] == started["job_id"]


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def test_every_command_prints_json() -> None:
    """All but `mcp`, which speaks a protocol of its own."""
    without = [words for words, one in commands(get_command(app)) if not any("--json" in p.opts for p in one.params)]
    assert without == [("mcp",)]


def test_every_answer_is_one_json_document(here: Mapping[str, str], taught: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completion": "c"}\n')
    config = tmp_path / "trl.yml"
    config.write_text("learning_rate: 1.0e-4\nuse_liger: true\n")
    first = f"{taught}@1"
    for words in (
        ("models", "list"),
        ("models", "catalog"),
        ("models", "show", "tiny"),
        ("models", "load", "tiny"),
        ("adapters", "list"),
        ("adapters", "show", taught),
        ("adapters", "load", taught),
        ("adapters", "tag", first, "stable"),
        ("adapters", "untag", taught, "stable"),
        ("adapters", "protect", first),
        ("adapters", "unprotect", first),
        ("adapters", "promote", first),
        ("adapters", "compare", first, first),
        ("adapters", "prune"),
        ("adapters", "unload", taught),
        ("adapters", "delete", taught),
        ("adapters", "restore", taught),
        ("jobs", "list"),
        ("data", "show", rows),
        ("plan", rows),
        ("plan", *FACT),
        ("report", taught),
        ("chat", "hello", "--model", taught, "--max-tokens", "4"),
        ("migrate", config, "--name", "x"),
        ("doctor",),
        ("doctor", "--repair"),
    ):
        result = run(*words, "--json")
        assert result.exit_code == 0, (words, result.output)
        assert json.loads(result.stdout) is not None, words


def test_an_error_is_json_too(here: Mapping[str, str]) -> None:
    result = run("adapters", "promote", "nobody@1", "--json")
    assert result.exit_code == 1
    assert set(json.loads(result.stdout)["error"]) == {"message", "type", "code", "param", "hint"}
    assert result.stderr == ""


def test_tables_are_whole_in_a_pipe(here: Mapping[str, str], quick: Path) -> None:
    name = "a-name-that-is-longer-than-any-terminal-is-wide-" * 2 + "x"
    assert run("teach", *FACT, "--name", name, "--config", quick).exit_code == 0
    command = [sys.executable, "-m", "fortwo", "adapters", "list"]
    variables = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | dict(here)
    listed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    head, *lines = listed.splitlines()
    assert head.split() == ["adapter", "current", "tags", "state", "base", "parent", "made", "digest"]
    row = next(line for line in lines if line.startswith(f"{name}@1"))
    version = json.loads(run("adapters", "show", name).stdout)["versions"][0]
    assert row.split()[-1] == version["digest"][:12]
    assert "\x1b" not in listed
    assert not any(line != line.rstrip() and len(line) > 1000 for line in lines)


def test_no_color_is_honoured(here: Mapping[str, str], taught: str) -> None:
    coloured, plain = (Terminal("jobs", "list", env=dict(here) | more) for more in ({}, {"NO_COLOR": "1"}))
    assert coloured.end() == plain.end() == 0
    assert "\x1b[32msucceeded" in coloured.shown
    assert "succeeded" in plain.shown
    assert "\x1b[3" not in plain.shown


def test_models_are_asked_side_by_side(here: Mapping[str, str], taught: str) -> None:
    both = ("--model", "tiny", "--model", taught, "--max-tokens", "4")
    body = json.loads(run("chat", "hello", *both, "--json").stdout)
    assert [reply["model"] for reply in body["replies"]] == ["tiny", taught]
    alone = json.loads(run("chat", "hello", *both[:2], "--max-tokens", "4", "--json").stdout)
    assert body["replies"][0] == alone["replies"][0]
    terminal = Terminal("chat", "hello", *both, env=here)
    assert terminal.end() == 0
    assert body["replies"][0]["answered_by"] in terminal.shown
    assert body["replies"][1]["answered_by"] in terminal.shown


def test_a_conversation_obeys_its_commands(here: Mapping[str, str], taught: str) -> None:
    typed = [
        "hello",
        '"""two',
        'lines"""',
        "/system Be brief.",
        f"/model {taught} tiny",
        "//slash",
        "/nonsense",
        "/clear",
        "last",
        "/bye",
        "never",
    ]
    result = run("chat", "--max-tokens", "2", "--json", input="\n".join(typed))
    assert result.exit_code == 0
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["hello", "two\nlines", "/slash", "last"]
    assert [len(turn["replies"]) for turn in turns] == [1, 1, 2, 2]
    assert "'/nonsense' is not a command." in result.stderr


def test_an_error_ends_a_piped_conversation_and_not_one_at_a_terminal(here: Mapping[str, str]) -> None:
    assert run("chat", "--model", "nobody", input="hello\n").exit_code == 1
    terminal = Terminal("chat", "--model", "nobody", "--max-tokens", "2", env=here)
    terminal.wait_for("you:")
    terminal.type("hello\r")
    terminal.wait_for("nobody")
    terminal.wait_for("Base models:")
    terminal.type("/model tiny\r")
    terminal.wait_for("Chat with tiny.")
    terminal.type("/bye\r")
    assert terminal.end() == 0
    history = Path(here["FORTWO_HOME"], "chat_history").read_text()
    assert "+hello" in history


def test_completion_knows_commands_and_options() -> None:
    for shell, words in (("bash", "fortwo adapters pro"), ("zsh", "fortwo adapters pro")):
        variables = os.environ | {
            "_FORTWO_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": "2",
            "_TYPER_COMPLETE_ARGS": words,
        }
        command = [Path(sys.executable).parent / "fortwo"]
        shown = subprocess.run(command, env=variables, capture_output=True, text=True).stdout
        assert "promote" in shown
        assert "protect" in shown
        assert "delete" not in shown


def test_no_option_is_read_by_nothing() -> None:
    """Every parameter of every function of the command line is used, so an option is never only accepted. The MCP
    library resolves those of `mcp_server`."""
    unread = []
    for file in {*Path(fortwo.cli.__file__).parent.glob("*.py")} - {Path(fortwo.cli.__file__).parent / "mcp_server.py"}:
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                parameters = [*function.args.args, *function.args.kwonlyargs]
                names = {one.arg for one in parameters if one.arg != "self" and not one.arg.startswith("_")}
                read = {
                    node.id
                    for statement in function.body
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                }
                unread += [f"{file.name}:{function.name}:{name}" for name in sorted(names - read)]
    assert unread == []
