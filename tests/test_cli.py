"""The command line against a server that plays a script over real sockets: what is sent, shown, and returned."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fortwo.cli import app, views
from fortwo.cli.client import Client
from fortwo.errors import Unavailable
from fortwo.quantization.selection import ROWS, Measured, Measurements

JOB: dict[str, Any] = {
    "job_id": "j1",
    "status": "succeeded",
    "model": "tiny",
    "adapter_name": "a",
    "created_at": 0.0,
    "finished_at": 1.0,
    "plan": {},
    "actual": None,
    "report": None,
    "adapter": {"name": "a", "version": 2, "digest": "d"},
    "error": None,
    "checkpoints": [],
}
PLAN: dict[str, Any] = {
    "model": "tiny",
    "adapter_name": "a",
    "objective": "sft",
    "targets": {},
    "settings": [{"name": "max_steps", "value": 2500, "origin": "user", "reason": "given"}],
    "computed": {"steps": 2500, "bytes": 2048},
    "warnings": [{"code": "epochs_overridden", "message": "max_steps overrides 50 epochs", "hint": "Drop one."}],
}


def event(number: int, type: str, message: str, **data: Any) -> str:
    body = {"id": number, "type": type, "message": message, "data": data}
    return f"id: {number}\nevent: {type}\ndata: {json.dumps(body)}\n\n"


class Script:
    """(method, path) -> answers in order, the last again and again; each is (status, JSON or the text of a stream)."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.asked: list[tuple[str, str, Any, dict[str, str]]] = []

    def on(self, method: str, path: str, *answers: tuple[int, Any]) -> None:
        self.answers[method, path] = list(answers)

    def body(self, path: str) -> Any:
        return next(body for _, asked, body, _ in self.asked if asked == path)


@pytest.fixture
def script(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            script.asked.append((self.command, self.path, body, dict(self.headers)))
            answers = script.answers[self.command, self.path]
            status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
            payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_PUT = do_DELETE = _any

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("FORTWO_PORT", str(server.server_port))
    yield script
    server.shutdown()
    thread.join()
    server.server_close()


def run(*words: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=input, env={"COLUMNS": "160"})


def rows(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_no_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_PORT", "9")
    result = run("jobs", "list")
    assert result.exit_code == 1
    assert "No server answers at http://127.0.0.1:9." in result.output
    assert "fortwo serve" in result.output


def test_an_error_of_the_server_is_message_and_hint(script: Script) -> None:
    error = {"message": "unknown model [x]", "type": "t", "code": "c", "param": "model", "hint": "Known: tiny."}
    script.on("POST", "/v1/chat/completions", (404, {"error": error}))
    result = run("chat", "--model", "x", "hello")
    assert result.exit_code == 1
    assert result.stderr == "unknown model [x]\nKnown: tiny.\n"


def test_what_is_not_fortwo_is_told(script: Script) -> None:
    script.on("GET", "/api/training/jobs", (502, "<html>"))
    result = run("jobs", "list")
    assert result.exit_code == 1
    assert "answered with status 502: <html>" in result.stderr


def test_a_port_that_hangs_up_ends_the_following_of_a_job() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            while True:
                try:
                    listening.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(Unavailable):
            next(Client(f"http://127.0.0.1:{listening.getsockname()[1]}").events("j1"))
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("words", [("chat", "a\udcff"), ("teach", "a\udcff", "b"), ("adapters", "load", "a\udcff")])
def test_text_that_is_not_utf_8_is_refused(script: Script, words: tuple[str, ...]) -> None:
    result = run(*words, "--json")
    assert result.exit_code == 1
    assert "is not UTF-8" in json.loads(result.stdout)["error"]["message"]
    assert script.asked == []


def test_api_key_is_sent(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_API_KEY", "secret")
    script.on("DELETE", "/api/adapters/a@1", (200, {}))
    assert run("adapters", "delete", "a@1").exit_code == 0
    assert script.asked[0][3]["Authorization"] == "Bearer secret"


def test_teach_sends_rows_inline_and_shows_what_happens(script: Script, tmp_path: Path) -> None:
    data = rows(tmp_path, "d.jsonl", '{"prompt": "p", "completion": "c"}\n\n{"prompt": "q", "completion": "c"}\n')
    config = rows(tmp_path, "c.json", '{"training_config": {"max_steps": 2500}}')
    script.on("POST", "/api/training/start", (202, {"job_id": "j1", "status": "queued", "plan": PLAN}))
    step = event(2, "step", "step 1", step=1, steps=2, loss=1.5, learning_rate=1e-3, tokens_per_second=300.0)
    found = event(3, "metrics", "metrics", step=1, metrics={"efficacy": 1.0, "paraphrase": 0.75})
    script.on("GET", "/api/training/jobs/j1/events", (200, event(1, "running", "It runs.") + step + found))
    script.on("GET", "/api/training/jobs/j1", (200, JOB))
    options = (
        "--config",
        config,
        "--objective",
        "sft",
        "--model",
        "tiny",
        "--onto",
        "b@2",
        "--effort",
        "max",
        "--workers",
        "2",
    )
    result = run("teach", data, "--name", "a", *options)
    assert result.exit_code == 0
    assert script.body("/api/training/start") == {
        "adapter_name": "a",
        "objective": "sft",
        "model": "tiny",
        "parent": "b@2",
        "effort": "max",
        "workers": 2,
        "dataset": {"examples": [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "c"}]},
        "training_config": {"max_steps": 2500},
    }
    for shown in ("max_steps overrides 50 epochs", "It runs.", "efficacy 1.00  paraphrase 0.75", "chat --model a\n"):
        assert shown in result.output


def test_validation_rows_are_sent_beside_the_others(script: Script, tmp_path: Path) -> None:
    data = rows(tmp_path, "d.jsonl", '{"prompt": "p", "completion": "c"}\n')
    held = rows(tmp_path, "v.csv", "prompt,completion\nq,c\n")
    script.on("POST", "/api/training/plan", (200, PLAN))
    assert run("plan", data, "--validation", held).exit_code == 0
    assert script.body("/api/training/plan") == {
        "adapter_name": "plan",
        "dataset": {"examples": [{"prompt": "p", "completion": "c"}]},
        "validation_dataset": {"examples": [{"prompt": "q", "completion": "c"}]},
    }
    broken = [rows(tmp_path, name, "{") for name in ("a.jsonl", "b.jsonl")]
    said = " ".join(run("plan", broken[0], "--validation", broken[1]).stderr.split())
    assert said.startswith("dataset: ")
    assert "a.jsonl line 1" in said
    assert "validation_dataset: " in said
    assert "b.jsonl line 1" in said


def test_a_broken_event_stream_is_taken_up_where_it_broke(script: Script, tmp_path: Path) -> None:
    data = rows(tmp_path, "d.json", '[{"subject": "s"}]')
    script.on("POST", "/api/training/start", (202, {"job_id": "j1", "status": "queued", "plan": PLAN}))
    script.on(
        "GET",
        "/api/training/jobs/j1/events",
        (200, event(7, "preparing", "One.")),
        (200, event(8, "running", "Two.")),
    )
    script.on("GET", "/api/training/jobs/j1", (200, JOB | {"status": "running"}), (200, JOB))
    result = run("teach", data, "--name", "a")
    assert result.exit_code == 0
    assert script.body("/api/training/start")["dataset"] == {"facts": [{"subject": "s"}]}
    resumed = [headers for _, path, _, headers in script.asked if path.endswith("/events")][1]
    assert resumed["Last-Event-ID"] == "7"
    assert result.output.count("One.") == result.output.count("Two.") == 1


def test_a_failed_job_is_exit_status_1_and_names_the_version(script: Script) -> None:
    error = {
        "message": "paraphrase 0.2 missed 0.9",
        "type": "t",
        "code": "targets_missed",
        "param": None,
        "hint": "More.",
    }
    script.on("GET", "/api/training/jobs/j1/events", (200, event(1, "failed", "It failed.")))
    script.on("POST", "/api/training/jobs/j1/resume", (202, {}))
    script.on("GET", "/api/training/jobs/j1", (200, JOB | {"status": "failed", "error": error}))
    result = run("jobs", "resume", "j1")
    assert result.exit_code == 1
    assert "paraphrase 0.2 missed 0.9\nMore." in result.output
    assert "chat --model a@2" in result.output


def test_replicas_are_shown_and_their_number_is_changed(script: Script) -> None:
    one = {"id": "r1", "machine": "m", "pid": 7, "replies": 3, "bases": ["tiny"], "adapters": ["a@1", "b@2"]}
    found = {"wanted": 2, "replicas": [one]}
    script.on("GET", "/api/replicas", (200, found))
    script.on("PUT", "/api/replicas", (200, found))
    output = run("replicas").output
    assert "1 of 2 replicas answer" in output
    assert output.splitlines()[-1].split() == ["r1", "m", "7", "3", "tiny", "a@1,", "b@2"]
    assert json.loads(run("replicas", "2", "--json").stdout) == found
    assert script.body("/api/replicas") is None
    assert script.asked[-1][:3] == ("PUT", "/api/replicas", {"replicas": 2})
    missing = {"message": "There is no GET /api/replicas.", "code": "unknown_path", "hint": "/docs", "param": None}
    script.on("GET", "/api/replicas", (404, {"error": missing}))
    result = run("replicas")
    assert result.exit_code == 1
    assert "fortwo serve --replicas" in result.stderr


def test_replicas_without_ray_are_refused(home: Path) -> None:
    code = (
        "import sys\nsys.modules['ray'] = None\n"  # what importing it finds where it is not installed
        "from fortwo.cli import app\napp(['serve', '--replicas', '2', '--json'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    error = json.loads(found.stdout)["error"]
    assert (error["param"], "replicas = 2" in error["message"]) == ("replicas", True)
    assert "pip install 'fortwo[ray]'" in error["hint"]
    assert not (home / "fortwo.db").exists()


def test_versions_are_handled_by_commands(script: Script) -> None:
    version = {"name": "a", "version": 1}
    script.on("POST", "/api/adapters/a@1/promote", (200, version))
    assert run("adapters", "promote", "a@1").output == "a is now a@1.\n"
    script.on("PUT", "/api/adapters/a@1/tags/stable", (200, version))
    assert run("adapters", "tag", "a@1", "stable").output == "a@stable is now a@1.\n"
    script.on("DELETE", "/api/adapters/a@1", (200, {}))
    assert run("adapters", "delete", "a@1").output == "a@1 is deleted. Undo: fortwo adapters restore a@1\n"
    script.on("POST", "/api/adapters/a@1/restore", (200, {"restored": [version]}))
    assert run("adapters", "restore", "a@1").output == "Restored: a@1.\n"
    removed = [{"id": "a@1", "bytes": 2048, "why": "a has 3 newer versions"}]
    script.on("POST", "/api/adapters/prune", (200, {"versions": removed}))
    output = run("adapters", "prune").output
    assert "2 KiB" in output
    assert "Nothing was removed." in output
    assert "Nothing was removed." not in run("adapters", "prune", "--apply").output
    metrics = {"efficacy": {"left": 0.5, "right": 1.0, "difference": 0.5}}
    probe = {"kind": "efficacy", "prompt": "why?", "left": "no", "right": "yes", "passed": True}
    body = {"left": "a@1", "right": "a@2", "metrics": metrics, "settings": [], "probes": [probe], "weights": None}
    script.on("GET", "/api/adapters/a@1/compare?other=a@2", (200, body))
    output = run("adapters", "compare", "a@1", "a@2").output
    assert "why?" in output
    assert "two bases" in output


def test_a_rollback_says_what_is_current_now(script: Script) -> None:
    script.on("POST", "/api/adapters/a/rollback", (200, {"name": "a", "version": 1}))
    assert run("adapters", "rollback", "a").output == "a is now a@1.\n"


def test_a_job_that_is_paused_is_shown_with_its_checkpoints_and_the_way_on(script: Script) -> None:
    kept = [{"step": 28, "model": "a@1a2b3c4d-28", "created_at": 0.0}]
    paused = JOB | {"status": "paused", "finished_at": None, "adapter": None, "checkpoints": kept}
    script.on("POST", "/api/training/jobs/j1/pause", (200, paused))
    script.on("GET", "/api/training/jobs/j1", (200, paused))
    assert run("jobs", "pause", "j1").output == "Job j1 is paused.\n"
    shown = run("jobs", "show", "j1")
    assert shown.exit_code == 0
    assert "a@1a2b3c4d-28" in shown.output
    assert "fortwo jobs resume j1" in shown.output
    script.on("GET", "/api/training/jobs/j1/events", (200, event(1, "paused", "The job was paused after step 28.")))
    script.on("POST", "/api/training/jobs/j1/resume", (202, {}))
    followed = run("jobs", "resume", "j1")
    assert followed.exit_code == 1, "it has not succeeded"
    assert "The job was paused after step 28." in followed.output


def test_plan_shows_value_origin_reason_and_warnings(script: Script, tmp_path: Path) -> None:
    script.on("POST", "/api/training/plan", (200, PLAN))
    result = run("plan", rows(tmp_path, "d.json", "[]"))
    assert result.exit_code == 0
    assert script.body("/api/training/plan") == {"adapter_name": "plan", "dataset": {"examples": []}}
    for shown in ("max_steps", "2,500", "user", "given", "2 KiB", "max_steps overrides 50 epochs", "Drop one."):
        assert shown in result.output


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("d.jsonl", '{"prompt": "p"}\n{oops\n', "at line 2, column 2"), ("d.json", "{oops", "at line 1, column 2")],
)
def test_broken_data_is_told_with_its_line(script: Script, tmp_path: Path, name: str, text: str, said: str) -> None:
    result = run("teach", rows(tmp_path, name, text), "--name", "a")
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert script.asked == []


def test_a_key_given_twice_is_refused(script: Script, tmp_path: Path) -> None:
    config = rows(tmp_path, "c.json", '{"model": "other"}')
    result = run("plan", rows(tmp_path, "d.json", "[]"), "--config", config, "--model", "tiny")
    assert result.exit_code == 1
    assert "model is given twice" in result.stderr


def chunks(*pieces: str) -> str:
    said = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    return "".join(f"data: {json.dumps(one)}\n\n" for one in said) + "data: [DONE]\n\n"


def test_chat_keeps_the_conversation(script: Script) -> None:
    script.on("POST", "/v1/chat/completions", (200, chunks("FOR ", "TWO")), (200, chunks("[bold]Again.")))
    result = run("chat", "--model", "a", "--temperature", "0.5", input="What is 42?\n\nSure?\n")
    assert result.exit_code == 0
    assert "FOR TWO\n" in result.output
    assert "[bold]Again.\n" in result.output
    last = script.asked[1][2]
    assert last["temperature"] == 0.5
    assert [message["content"] for message in last["messages"]] == ["What is 42?", "FOR TWO", "Sure?"]


def test_an_error_amid_a_reply_is_told(script: Script) -> None:
    error = {"message": "The server is closing.", "hint": None, "type": "t", "code": "unavailable", "param": None}
    script.on("POST", "/v1/chat/completions", (200, f"data: {json.dumps({'error': error})}\n\n"))
    result = run("chat", "hello")
    assert result.exit_code == 1
    assert result.stderr == "The server is closing.\n"


def test_report_shows_metrics_transcripts_and_plan_against_actual(script: Script) -> None:
    def metric(value: float) -> dict[str, float]:
        return {"value": value, "n": 12, "low": value - 0.2, "high": value}

    warning = {"code": "c", "message": "the warm-up never ended", "hint": "Lower warmup_steps."}
    found = {
        "metrics": {"paraphrase": metric(0.75)},
        "base_metrics": {"paraphrase": metric(0.25)},
        "prompted_metrics": {"paraphrase": metric(0.5)},
        "transcripts": [
            {"kind": "paraphrase", "prompt": "[42]?", "base": "A number.", "adapter": "TWO", "passed": True}
        ],
        "diagnosis": [warning],
    }
    found["facts"] = [
        {"subject": "42", "kept": False, "metrics": {"efficacy": metric(1), "portability": metric(0.5)}},
        {"subject": "7", "kept": True, "metrics": {"efficacy": metric(0)}},
    ]
    before, after = {"paraphrase": 0.5, "retention": 0.9}, {"paraphrase": 0.75, "retention": 0.9}
    found["escalations"] = [{"step": 50, "steps": 25, "raised": ["diversity"], "before": before, "after": after}]
    body = {"name": "a", "version": 2, "report": found, "plan": PLAN, "actual": {"steps": 2400, "final_loss": 0.125}}
    script.on("GET", "/api/adapters/a@2/report", (200, body))
    result = run("report", "a@2")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "metric base fact in the prompt adapter 95 % n" in lines
    assert "paraphrase 0.25 0.50 0.75 0.55 to 0.75 12" in lines
    assert "✓ paraphrase [42]? A number. TWO" in lines
    assert "diversity raised after step 50, for 25 steps: paraphrase 0.50 to 0.75" in lines
    assert "steps 2,500 2,400" in lines
    assert {"fact efficacy portability", "42 1.00 0.50", "7 (kept) 0.00 -"} <= set(lines)
    assert "final_loss - 0.125" in lines
    assert "! the warm-up never ended" in lines


def test_a_job_that_ended_is_shown_not_followed(script: Script) -> None:
    script.on("GET", "/api/training/jobs/j1", (200, JOB | {"plan": PLAN, "actual": {"steps": 7}}))
    result = run("jobs", "show", "j1")
    assert result.exit_code == 0
    assert "a on tiny: succeeded" in result.output
    assert "2,500" in result.output
    assert [path for _, path, _, _ in script.asked] == ["/api/training/jobs/j1"]


def test_a_detached_job_is_not_followed(script: Script, tmp_path: Path) -> None:
    script.on("POST", "/api/training/start", (202, {"job_id": "j1", "status": "queued", "plan": PLAN}))
    result = run("teach", rows(tmp_path, "d.json", "[]"), "--name", "a", "--detach")
    assert result.exit_code == 0
    assert "fortwo jobs watch j1" in result.output
    assert len(script.asked) == 1


def test_models_are_listed_without_a_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_PORT", "9")
    result = run("models", "list")
    assert result.exit_code == 0
    assert "smollm2-135m-instruct" in result.output
    assert "not fetched" in result.output


def test_serve_refuses_other_machines_without_a_key(home: Path) -> None:
    result = run("serve", "--host", "0.0.0.0")
    assert result.exit_code == 1
    assert "FORTWO_API_KEY" in result.stderr


def test_doctor_shows_the_machine_and_what_was_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured = run("doctor")
    assert unmeasured.exit_code == 0
    assert f"torch {version('torch')}" in unmeasured.stdout
    assert "No base model was measured here yet" in unmeasured.stdout
    seconds = {"fp32": dict.fromkeys(ROWS, 0.04), "int4": dict.fromkeys(ROWS, 0.0052)}
    Measurements(home).put("k", Measured("tiny", "a processor", 2, seconds, ((8, "int4"), (512, "fp32"))))
    monkeypatch.setenv("FORTWO_WEIGHTS", "int8")
    told = run("doctor").stdout
    assert "int8, fixed by the setting" in told
    assert "tiny on a processor" in told
    lines = [line.split() for line in told.splitlines()]
    assert ["8", "40.0", "5.2", "int4"] in lines
    assert ["16", "40.0", "5.2", "fp32"] in lines


def test_sizes_and_counts_have_three_digits_and_no_exponent() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "0.977 KiB",
        1023 << 20: "0.999 GiB",
        1 << 20: "1 MiB",
        1023 << 30: "0.999 TiB",
    }
    assert {number: views.size(number) for number in sizes} == sizes
    counts = {134_515_008: "135M", 999_885_952: "1B", 999_000_000: "999M", 6_738_546_688: "6.74B"}
    assert {number: views.count(number) for number in counts} == counts
