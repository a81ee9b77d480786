"""Connections: how many, and how long and how large the beginning of a request may be."""

from __future__ import annotations

import json
import logging
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving import Served, serve, tiny_settings

from fortwo.server import protocol
from fortwo.server.log_filter import RepeatFilter

CONNECTIONS = 20


@pytest.fixture
def short(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that waits for headers for a moment, and takes CONNECTIONS connections."""
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    with serve(tiny_settings(tmp_path, tiny, max_connections=CONNECTIONS)) as served:
        yield served


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read(line: socket.socket) -> bytes:
    """All that comes until the server closes the connection; a test hangs here when it does not."""
    answer = b""
    while True:
        try:
            piece = line.recv(1 << 16)
        except ConnectionResetError:
            return answer
        if not piece:
            return answer
        answer += piece


def code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error["message"]
    assert error["hint"]
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize("sent", [b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nA: b"])
def test_half_a_request_is_given_up(short: Served, sent: bytes) -> None:
    with connect(short) as line:
        line.sendall(sent)
        assert code(read(line)) == (408, "headers_timeout")


def test_a_connection_that_says_nothing_is_closed(short: Served) -> None:
    with connect(short) as line:
        assert read(line) == b""


def test_half_a_second_request_is_given_up_too(short: Served) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(short) as line:
        line.sendall(whole + whole[:9])
        answer = read(line)
    assert answer.count(b"200 OK") == 1


def test_a_reply_may_take_longer_than_headers_may(short: Served) -> None:
    reply = short.chat(max_tokens=600, ignore_eos=True, stream=True)
    assert reply.text.rstrip().endswith("[DONE]")
    assert short.http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        b"A: " + b"x" * (100 << 10) + b"\r\n",
        b"".join(b"A%d: x\r\n" % n for n in range(300)),
        b"A: " + b"x" * (2 << 20) + b"\r\n",
    ],
    ids=["one long", "many", "2 MiB"],
)
def test_headers_are_limited(served: Served, headers: bytes) -> None:
    with connect(served) as line:
        try:
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + headers + b"\r\n")
        except (ConnectionResetError, BrokenPipeError):
            return  # it was refused before all had been sent
        answer = read(line)
        assert not answer or code(answer) == (431, "headers_too_large")
    assert served.http.get("/healthz").status_code == 200


def test_a_long_url_is_refused(served: Served) -> None:
    with connect(served) as line:
        line.sendall(b"GET /" + b"x" * (70 << 10) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert code(read(line)) == (431, "headers_too_large")


def test_what_is_not_http_gets_the_one_shape(served: Served) -> None:
    with connect(served) as line:
        line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert code(read(line)) == (400, "invalid_request")


def test_connections_are_limited_and_places_become_free(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_settings(tmp_path, tiny, max_connections=CONNECTIONS)) as served:
        with ExitStack() as opened:
            lines = [opened.enter_context(connect(served)) for _ in range(CONNECTIONS)]
            while len(served.server.server_state.connections) < CONNECTIONS:
                pass
            with connect(served) as line:
                assert code(read(line)) == (503, "unavailable")
            lines[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in read(lines[0])
        while served.server.server_state.connections:
            pass
        assert served.http.get("/healthz").status_code == 200


def test_there_are_never_more_connections_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, wanted in ((1024, 900), (150, 50), (50, protocol.FEWEST), (resource.RLIM_INFINITY, 900)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert protocol.limited(900).max_connections == wanted


def test_a_message_that_repeats_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("test.repeats")
    log.addFilter(quiet := RepeatFilter(seconds=3600))
    for n in range(1000):
        log.error("out of system resource\nsocket: %d", n)
    log.error("something else")
    assert [record.getMessage().split("\n")[0] for record in caplog.records] == [
        "out of system resource",
        "something else",
    ]
    quiet._seconds = 0
    log.error("out of system resource\nsocket: %d", 7)
    assert re.search(r"\(999 more like this", caplog.records[-1].getMessage())
