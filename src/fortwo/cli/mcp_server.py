"""An MCP server over standard input and output, whose tools talk to a running fortwo server by its public HTTP API."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp_types import ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field

from fortwo.cli.client import Client
from fortwo.errors import FortwoError
from fortwo.records import Json
from fortwo.train.request import TrainingRequest

INSTRUCTIONS = (
    "fortwo teaches a local language model facts, examples or preferences as a LoRA adapter, proves by an exam that it "
    "learned them, and serves it. First call plan with a training request, show the plan to the user, then call teach "
    "with the same request. Follow the job with job until its status is succeeded, failed or cancelled, read its "
    "report, and try the adapter with chat. A job that failed with targets_missed has published a version that is not "
    "current; promote makes it current."
)
REPLY_TOKENS = 512
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(destructive_hint=False, open_world_hint=False)
_CHANGES = ToolAnnotations(destructive_hint=True, idempotent_hint=True, open_world_hint=False)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Session:
    """secret: only this process can make the tokens that confirm a request."""

    client: Client
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def token(self, request: TrainingRequest) -> str:
        content = json.dumps(_body(request), sort_keys=True).encode()
        return hmac.new(self.secret, content, hashlib.sha256).hexdigest()[:16]

    def plan(self, request: TrainingRequest) -> Json:
        plan: Json = self.client.post("/api/training/plan", _body(request))
        return plan


class Confirmation(BaseModel):
    """What the user is asked before a training starts."""

    start: bool = Field(description="Start the training?")


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


Request = Annotated[
    TrainingRequest,
    Field(
        description='The body of POST /api/training/start, for example {"adapter_name": "capital", "dataset": '
        '{"facts": [{"subject": "the capital of Atlantis", "answer": "It is Oricalco.", "match": ["Oricalco"], '
        '"questions": ["What is the capital of Atlantis?"]}]}}.'
    ),
]


def _told(tool: Callable[P, R]) -> Callable[P, R]:
    """The tool, with fortwo's errors as errors of the tool: what is wrong, and the remedy."""

    @functools.wraps(tool)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return tool(*args, **kwargs)
        except FortwoError as error:
            raise ToolError(" ".join(part for part in (error.message, error.hint) if part)) from None

    return told


def _session(ctx: Context[Any, Any]) -> _Session:
    session: _Session = ctx.request_context.lifespan_context
    return session


def _body(request: TrainingRequest) -> Json:
    return request.model_dump(mode="json", exclude_none=True, exclude_unset=True)


@_told
def plan(request: Request, ctx: Context[Any, Any]) -> Json:
    """The plan for a training request: every setting with its reason, steps, estimates of time and memory, warnings.
    Nothing is started. `confirm` is what teach needs where the user cannot be asked by the client."""
    session = _session(ctx)
    return {"plan": session.plan(request), "confirm": session.token(request)}


@_told
def _confirmed(request: Request, ctx: Context[Any, Any], confirm: str | None) -> Elicit[Confirmation] | Confirmation:
    """Asks the user by the client, where it can; otherwise the token of the plan is what counts."""
    session = _session(ctx)
    capabilities = ctx.client_capabilities
    elicitation = None if capabilities is None else capabilities.elicitation
    if elicitation is not None and (elicitation.form is not None or elicitation.url is None):
        planned = session.plan(request)
        computed = planned["computed"]
        return Elicit(
            f"Teach the adapter {planned['adapter_name']!r} on {planned['model']}: {planned['objective']}, "
            f"{computed['rows']} rows, {computed['steps']} steps.",
            Confirmation,
        )
    if confirm is None or not hmac.compare_digest(confirm.encode(), session.token(request).encode()):
        raise ToolError(
            "The training was not started, because it is not confirmed: "
            f"confirm = {confirm!r} does not belong to this request. Call plan with the same request, show the plan to "
            "the user, and if the user agrees, call teach with the value of `confirm` in its answer."
        )
    return Confirmation(start=True)


@_told
def teach(
    request: Request,
    ctx: Context[Any, Any],
    answer: Annotated[ElicitationResult[Confirmation], Resolve(_confirmed)],
    confirm: Annotated[
        str | None, Field(description="From the answer of plan; not needed where the client asks the user itself.")
    ] = None,
) -> Json:
    """Start the training of an adapter, once the user has confirmed it. Returns at once with the job's id; the tool job
    says how far it is."""
    if not isinstance(answer, AcceptedElicitation) or not answer.data.start:
        return {"started": False, "reason": "The user did not confirm the training."}
    started = _session(ctx).client.post("/api/training/start", _body(request))
    return {"started": True, "job_id": started["job_id"], "status": started["status"]}


@_told
def job(job_id: Annotated[str, Field(min_length=1)], ctx: Context[Any, Any]) -> Json:
    """How far a training job is: status, step, metrics so far, the adapter's version, and the error if it failed."""
    found = _session(ctx).client.get(f"/api/training/jobs/{_path(job_id)}")
    names = ("job_id", "status", "adapter_name", "model", "progress", "adapter", "error", "created_at", "finished_at")
    return {name: found[name] for name in names}


@_told
def report(
    adapter: Annotated[str, Field(min_length=1, description="Name, or name@version.")],
    ctx: Context[Any, Any],
    transcripts: Annotated[bool, Field(description="Also every prompt of the exam, with both replies.")] = False,
) -> Json:
    """The report of an adapter's exam: its metrics beside those of the base, and the diagnosis if a target was
    missed."""
    found = _session(ctx).client.get(f"/api/adapters/{_path(adapter)}/report")
    whole = found["report"]
    shown = whole if transcripts else {name: value for name, value in whole.items() if name != "transcripts"}
    return {"name": found["name"], "version": found["version"], "report": shown}


@_told
def chat(
    model: Annotated[str, Field(min_length=1, description="A base, an adapter, or adapter@version.")],
    messages: Annotated[list[ChatMessage], Field(min_length=1)],
    ctx: Context[Any, Any],
    max_tokens: Annotated[int, Field(ge=1)] = REPLY_TOKENS,
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0,
) -> str:
    """A model's reply to a conversation."""
    body = {
        "model": model,
        "messages": [message.model_dump() for message in messages],
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    answer = _session(ctx).client.post("/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"] or ""


@_told
def list_adapters(ctx: Context[Any, Any]) -> Json:
    """All versions of all adapters: which is current, on which base, and whether it is loaded."""
    found = _session(ctx).client.get("/api/adapters")
    names = ("name", "version", "current", "tags", "protected", "parent", "state", "base_model", "created_at")
    return {"adapters": [{name: one[name] for name in names} for one in found["adapters"]]}


@_told
def promote(
    version: Annotated[str, Field(min_length=1, description="As name@version.")], ctx: Context[Any, Any]
) -> Json:
    """Make a version the current one of its adapter: what the name without a version means from then on."""
    found = _session(ctx).client.post(f"/api/adapters/{_path(version)}/promote")
    return {"name": found["name"], "version": found["version"], "current": found["current"]}


def _path(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="@")


def build(client: Client) -> MCPServer[_Session]:
    """The MCP server with its tools, over `client`."""

    @asynccontextmanager
    async def lifespan(_: MCPServer[_Session]) -> AsyncIterator[_Session]:
        yield _Session(client)

    server = MCPServer("fortwo", instructions=INSTRUCTIONS, lifespan=lifespan, log_level="WARNING")
    for tool in (plan, job, report, chat, list_adapters):
        server.tool(annotations=_READS)(tool)
    server.tool(annotations=_ADDS)(teach)
    server.tool(annotations=_CHANGES)(promote)
    return server
