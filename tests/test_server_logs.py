"""Ids of requests, and the log: each line names what it is about, and none has a prompt, a query or a key."""

from __future__ import annotations

import json
import logging
import signal
import socket
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo import log_context
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.jobs.store import JobStore
from fortwo.server.logs import JsonLines, TextLines
from fortwo.server.observation import request_id_for
from tests.test_resume import process
from tests.test_server_training import start

OURS = "order-7:retry/2"


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("sent", ["a", OURS, "Root=1-67891233-abcdef", "x" * 128])
def test_a_clients_id_is_kept(sent: str) -> None:
    assert request_id_for(sent) == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "two words", 'quote"', "line\nfeed", "ümlaut", "a,b"])
def test_what_is_no_id_gets_a_new_one(sent: str | None) -> None:
    first, second = request_id_for(sent), request_id_for(sent)
    assert first != second
    assert first.startswith("req_")
    assert request_id_for(first) == first


def test_every_response_has_an_id(served: Served) -> None:
    answers = [served.chat(), served.chat(stream=True), served.http.get("/nowhere"), served.http.get("/page/app.js")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(answers)
    kept = served.http.get("/v1/models", headers={"X-Request-Id": OURS})
    assert kept.headers["x-request-id"] == OURS
    assert served.http.get("/healthz", headers={"X-Request-Id": "no id"}).headers["x-request-id"] != "no id"
    plain = served.post("/api/chat", {"model": "nobody"})
    assert plain.status_code == 404
    assert plain.headers["x-request-id"]


def test_clients_of_openai_show_it(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=2,
        extra_headers={"X-Request-Id": OURS},
    )
    assert reply._request_id == OURS
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.request_id is not None
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["request_id"] == caught.value.request_id


def test_an_error_within_a_stream_names_it(served: Served) -> None:
    with served.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 900},
        headers={"X-Request-Id": OURS},
    ) as response:
        found = response.iter_lines()
        next(found)
        for generation in list(served.state.admission._requests):
            generation.stop()
        said = [json.loads(line[6:]) for line in found if line.startswith("data: {")]
    assert said[-1]["error"]["request_id"] == OURS


def test_a_request_that_never_reaches_the_application_has_one_too(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        head, _, body = line.recv(1 << 16).partition(b"\r\n\r\n")
    assert f"x-request-id: {json.loads(body)['error']['request_id']}".encode() in head


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("fortwo.test").makeRecord(
        "fortwo.test", logging.WARNING, __file__, 1, message, args, None, extra=extra
    )


def test_a_line_of_json_has_its_fields_and_the_ids() -> None:
    token = log_context.request_id.set(OURS)
    try:
        with log_context.about_job("job-1"):
            found = json.loads(JsonLines().format(record('two\n"lines" of %d', 7, status=200)))
    finally:
        log_context.request_id.reset(token)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "WARNING",
        "logger": "fortwo.test",
        "message": 'two\n"lines" of 7',
        "status": 200,
        "request_id": OURS,
        "job_id": "job-1",
    }
    without = json.loads(JsonLines().format(record("x")))
    assert "request_id" not in without
    assert "job_id" not in without


def test_a_line_of_text_is_the_message_with_the_ids() -> None:
    assert TextLines().format(record("hello %s", "you")) == "hello you"
    with log_context.about_job("job-1"):
        assert TextLines().format(record("hello")) == "hello [job-1]"


def test_a_request_has_one_line_with_the_template_of_its_route(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fortwo.access"):
        answer = served.http.get("/v1/models/some-name?token=sesame")
        served.chat(max_tokens=-1)
        served.http.get("/healthz")
        deadline = time.monotonic() + 30
        while len(lines := [line for line in caplog.records if line.name == "fortwo.access"]) < 3:
            assert time.monotonic() < deadline  # a line is written once the response is sent
            time.sleep(0.01)
    first, second, third = lines
    assert (first.method, first.route, first.status) == ("GET", "/v1/models/{model}", 404)
    assert first.bytes == len(answer.content)
    assert first.milliseconds > 0
    assert (second.method, second.route, second.status) == ("POST", "/v1/chat/completions", 400)
    assert third.getMessage().startswith("GET /healthz 200 in ")
    assert "some-name" not in caplog.text
    assert "sesame" not in caplog.text


def test_what_the_devices_thread_and_a_job_say_names_them(tiny: Path, tmp_path: Path) -> None:
    named: list[tuple[str, dict[str, str]]] = []

    class Note(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            named.append((line.getMessage(), log_context.fields()))

    handler = Note()
    logging.getLogger("fortwo").addHandler(handler)
    try:
        with serve(tiny_settings(tmp_path, tiny)) as served:
            served.chat()  # loads the base
            runner = served.state.engine._bases["tiny"].runner
            runner.prefill = None
            failed = served.http.post(
                "/v1/chat/completions",
                json={"model": "tiny", "messages": [{"role": "user", "content": "unseen"}]},
                headers={"X-Request-Id": OURS},
            )
            refused(failed, 500, "internal_error")
            del runner.prefill
            served.state.engine.submit = None  # the exam of the job needs it
            job = served.wait(start(served, "logged")["job_id"])
            assert job["error"]["code"] == "internal_error"
    finally:
        logging.getLogger("fortwo").removeHandler(handler)
    assert ("A reply ends because its forward failed.", {"request_id": OURS}) in named
    assert (f"Job {job['job_id']} failed.", {"job_id": job["job_id"]}) in named


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secret_is_logged(tiny: Path, tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    settings = tiny_settings(home, tiny)
    store = JobStore(settings.database)
    key = ApiKeyStore(store).create("all", ["admin"])
    store.close()
    capfd.readouterr()
    secret, prompt = "sesame-server-key", "the quick brown secret"
    with process(home, FORTWO_LOG_FORMAT=form, FORTWO_API_KEY=secret) as (server, http):
        for token in (key, secret, "sesame-wrong-key"):
            auth = {"Authorization": f"Bearer {token}", "X-Request-Id": OURS}
            body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2}
            http.post("/v1/chat/completions", json=body, headers=auth)
            http.post("/v1/chat/completions", json=body | {prompt: prompt}, headers=auth)
            http.post("/v1/chat/completions", content=f'{{"{prompt}'.encode(), headers=auth)
            http.get(f"/v1/models/x?api_key={key}&q={prompt}", headers=auth)
            http.get(f"/{key}/{prompt}", headers=auth)
        rows = [{"prompt": prompt, "completion": prompt}] * 4
        http.post(
            "/api/training/start",
            json={"adapter_name": "a", "dataset": {"examples": rows}, "training_config": {"max_steps": 1}},
            headers=auth | {"Authorization": f"Bearer {key}"},
        )
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    said = capfd.readouterr().err
    for hidden in (key, secret, "sesame", "brown", "q="):
        assert hidden not in said
    assert said.count(OURS) >= 16
    if form == "json":
        access = [line for line in lines(said) if line["logger"] == "fortwo.access" and line.get("request_id") == OURS]
        assert {line["status"] for line in access} >= {200, 400, 401, 404}
        assert all(line["level"] == "INFO" and line["time"] for line in access)
