"""The MCP server, by the SDK's own client over real standard input and output, against a running server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp_types import ElicitRequestParams, ElicitResult
from serving import Served

from tests.test_server_native import publish, say

FACT = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}


def request(name: str, **more: Any) -> dict[str, Any]:
    config = {"max_steps": 2, "escalation_rounds": 0}
    return {"adapter_name": name, "dataset": {"facts": [FACT]}, "training_config": config, **more}


def talk(
    served: Served,
    conversation: Callable[[Client], Awaitable[None]],
    answer: ElicitResult | None = None,
    mode: str = "auto",
    **environment: str,
) -> list[str]:
    """What a client says to `fortwo mcp`. answer: of the user, whom the client can ask then; returns what it asked."""
    asked: list[str] = []

    async def ask(_context: Any, params: ElicitRequestParams) -> ElicitResult:
        asked.append(params.message)
        assert answer is not None
        return answer

    port = served.url.rpartition(":")[2]
    settings = {"FORTWO_HOME": str(served.state.settings.home), "FORTWO_PORT": port, **environment}
    python_path = os.environ.get("PYTHONPATH", "")
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "fortwo", "mcp"], env=settings | {"PYTHONPATH": python_path}
    )

    async def run() -> None:
        callback = None if answer is None else ask
        async with Client(server, elicitation_callback=callback, mode=mode) as client:
            await conversation(client)

    asyncio.run(asyncio.wait_for(run(), 120))
    return asked


async def call(client: Client, tool: str, **arguments: Any) -> Any:
    """The structured result of a tool that succeeds."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    found = result.structured_content
    return found["result"] if found is not None and set(found) == {"result"} else found


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return " ".join(part.text for part in result.content)  # type: ignore[union-attr]


def test_a_client_that_cannot_ask_teaches_with_the_token_of_the_plan(served: Served) -> None:
    async def conversation(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"plan", "teach", "job", "report", "chat", "list_adapters", "promote"}
        assert "ctx" not in tools["teach"].input_schema["properties"]
        assert "answer" not in tools["teach"].input_schema["properties"]
        assert tools["plan"].annotations is not None
        assert tools["plan"].annotations.read_only_hint
        wanted = request("by-mcp")
        planned = await call(client, "plan", request=wanted)
        assert (planned["plan"]["adapter_name"], planned["plan"]["objective"]) == ("by-mcp", "override")
        for confirm in ({}, {"confirm": "yes"}, {"confirm": "ümlaut"}):
            assert "not confirmed" in await refused(client, "teach", request=wanted, **confirm)
        other = request("other")
        assert "not confirmed" in await refused(client, "teach", request=other, confirm=planned["confirm"])
        assert "by-mcp" not in served.http.get("/api/training/jobs").text
        started = await call(client, "teach", request=wanted, confirm=planned["confirm"])
        assert started["started"]
        while (job := await call(client, "job", job_id=started["job_id"]))["status"] not in ("succeeded", "failed"):
            await asyncio.sleep(0.1)
        assert job["error"]["code"] == "targets_missed"
        report = await call(client, "report", adapter="by-mcp@1")
        assert report["report"]["metrics"]["efficacy"]["n"] > 0
        assert "transcripts" not in report["report"]
        whole = await call(client, "report", adapter="by-mcp@1", transcripts=True)
        assert whole["report"]["transcripts"]
        adapters = (await call(client, "list_adapters"))["adapters"]
        assert [one["current"] for one in adapters if one["name"] == "by-mcp"] == [False]
        promoted = await call(client, "promote", version="by-mcp@1")
        assert promoted == {"name": "by-mcp", "version": 1, "current": True}
        said = await call(
            client, "chat", model="by-mcp", messages=[{"role": "user", "content": "hello"}], max_tokens=16
        )
        assert said == say(served, "by-mcp")

    talk(served, conversation)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize(
    ("answer", "started"),
    [
        (ElicitResult(action="accept", content={"start": True}), True),
        (ElicitResult(action="accept", content={"start": False}), False),
        (ElicitResult(action="decline"), False),
        (ElicitResult(action="cancel"), False),
    ],
    ids=["yes", "no", "decline", "cancel"],
)
def test_a_client_that_can_ask_asks_the_user(served: Served, mode: str, answer: ElicitResult, started: bool) -> None:
    name = f"asked-{mode}-{answer.action}-{started}".lower()

    async def conversation(client: Client) -> None:
        planned = await call(client, "plan", request=request(name))
        found = await call(client, "teach", request=request(name), confirm=planned["confirm"])
        assert found["started"] is started
        if started:
            served.wait(found["job_id"])

    asked = talk(served, conversation, answer, mode)
    assert len(asked) == 1
    assert f"'{name}' on tiny: override" in asked[0]
    assert (name in served.http.get("/api/training/jobs").text) is started


def test_errors_say_what_is_wrong_and_what_to_do(served: Served) -> None:
    publish(served, "mcp-plain")

    async def conversation(client: Client) -> None:
        said = await refused(client, "plan", request=request("x", training_config={"learning_rte": 1}))
        assert "learning_rate" in said
        assert "'nobody'" in await refused(client, "report", adapter="nobody")
        assert "has no report" in await refused(client, "report", adapter="mcp-plain")
        assert "a/b" in await refused(client, "job", job_id="a/b")
        await refused(client, "chat", model="mcp-plain", messages=[])
        await refused(client, "plan", request={"adapter_name": ""})

    talk(served, conversation)


def test_a_server_that_does_not_run_is_named(served: Served) -> None:
    async def conversation(client: Client) -> None:
        assert "fortwo serve" in await refused(client, "list_adapters")

    talk(served, conversation, FORTWO_PORT="9")


def test_without_the_package_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    import subprocess

    code = "import sys; sys.modules['mcp'] = None; from fortwo.cli import app; app(['mcp'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "pip install 'fortwo[mcp]'" in found.stderr
    assert json.dumps(found.stdout) == '""'
