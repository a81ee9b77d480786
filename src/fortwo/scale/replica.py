"""A replica: an engine that answers requests from a home that it only reads.

Everything that writes (jobs, the database, publication) belongs to the head. A replica answers what the head hands to
it, with fortwo's own routes and the version that the head pinned.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from ray import serve
from starlette.types import Message

from fortwo import log_context
from fortwo.adapters.shared import open_store
from fortwo.errors import Conflict, FortwoError, NotFound, Unavailable
from fortwo.home import ID
from fortwo.hub.catalog import Catalog
from fortwo.records import Json
from fortwo.scale.pins import Pin
from fortwo.server import errors, llama_cpp, ollama
from fortwo.server.openai import chat, completions, embeddings, responses
from fortwo.server.state import ServingState
from fortwo.settings import Settings

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore
    from fortwo.engine.registry import Target

MEASURED = ("measured.json", "fp32_kernel.json")  # what a machine remembers about itself
GONE = "gone"  # in place of a response: the pinned version was deleted


@dataclass
class _Call:
    """One request. gone: whether its version was deleted."""

    pin: Pin
    gone: bool = False


_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("call")


class StoreNotShared(Conflict):
    code = "store_not_shared"


def check_home(home: Path, id: str | None, digests: Mapping[str, str], machine: str) -> None:
    """Raises StoreNotShared unless `home` is, on this machine, the head's: its id, and the digests of the prepared
    bases that the head has, by name. id: None where adapters are kept under a URL, and each machine has its own home.
    """
    if id is not None:
        _check_id(home, id, machine)
    catalog = Catalog(home / "models")
    for base, digest in digests.items():
        with suppress(NotFound):
            info = catalog.model_info(base)
            if info is not None and info.digest != digest:
                raise StoreNotShared(
                    f"The base {base!r} of {machine} has the digest {info.digest}, but the head's has {digest}.",
                    param="model",
                    hint=f"Let {home / 'models'} be the head's, or remove the model there and prepare it again.",
                )


def _check_id(home: Path, id: str, machine: str) -> None:
    hint = f"Mount the head's FORTWO_HOME at {home} on every machine of the cluster, for example by NFS."
    try:
        found = (home / ID).read_text("ascii", "replace").strip()
    except OSError as error:
        raise StoreNotShared(
            f"{machine} cannot read the home {home}: {error.strerror}.", param="home", hint=hint
        ) from None
    if found != id:
        raise StoreNotShared(
            f"The home {home} of {machine} is another one than the head's: its id is {found!r}, not {id!r}.",
            param="home",
            hint=hint,
        )


class ReplicaState(ServingState):
    """The engine of a replica. Measurements of this machine are kept in a folder of its own, which begins with those of
    the home. Where adapters are kept under a URL, that folder also has those that the replica has fetched."""

    def __init__(self, settings: Settings) -> None:
        with ExitStack() as built:
            measured = Path(built.enter_context(tempfile.TemporaryDirectory(prefix="fortwo-")))
            for file in MEASURED:
                with suppress(FileNotFoundError):
                    shutil.copy(settings.home / file, measured)
            self._fetched = measured / "adapters"
            self._build_serving(settings, built, measured)
            self._closing = built.pop_all()

    def _adapter_store(self, settings: Settings, built: ExitStack) -> AdapterStore:
        return open_store(
            settings.adapters_dir if settings.adapters_url is None else self._fetched, settings.adapters_url
        )

    async def resolve(self, model: str) -> Target:
        """The weights that the head pinned for this request. Raises what ModelRegistry.resolve raises, and Conflict if
        they are not the head's."""
        call = _call.get()
        try:
            target = await super().resolve(call.pin.ref)
        except (FortwoError, OSError):  # a version that is deleted meanwhile loses its files first
            call.gone = not await run_in_threadpool(self._exists, call.pin.ref)
            raise
        call.pin.check(target.model.digest if target.adapter_key is None else target.adapter_key)
        return replace(target, name=model)

    def _exists(self, ref: str) -> bool:
        try:
            self.registry.version_of(ref)
        except NotFound:
            return False
        return True

    async def load(self, ref: str) -> None:
        """Load a base, a version or a checkpoint, if necessary. Raises what ModelRegistry.resolve raises."""
        await super().resolve(ref)

    def close(self) -> None:
        self._closing.close()


def create_app(state: ReplicaState) -> FastAPI:
    """The routes that answer with a model. Keys, sizes of bodies and the number of requests are the head's matter."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.fortwo = state
    errors.install(app)
    app.add_middleware(errors.UnexpectedErrorMiddleware)
    routers = (chat, completions, embeddings, responses, ollama, llama_cpp)
    for module in routers:
        app.include_router(module.router)
    return app


class Replica:
    """What Ray Serve runs, in a process of its own.

    settings: those of the head as JSON; home_id, digests: as in check_home. Raises what check_home raises."""

    def __init__(self, settings: Json, home_id: str | None, digests: Mapping[str, str]) -> None:
        loaded = Settings(**settings)
        check_home(loaded.home, home_id, digests, socket.gethostname())
        self._state = ReplicaState(loaded)
        self._app = create_app(self._state)
        self._names: dict[str, str] = {}  # of adapters that were loaded, by digest
        # Serve remembers what was loaded here, and sends requests for it here again.
        self._hold: Callable[[str], Any] = serve.multiplexed(max_num_models_per_replica=loaded.max_adapters)(
            self._loader()
        )
        with suppress(FortwoError):  # requests for it get the reason
            if self._state.catalog.model_info(loaded.default_model) is not None:
                self._state.registry.load_base(loaded.default_model)

    def _loader(self) -> Callable[[str], Any]:
        async def load(ref: str) -> str:
            await self._state.load(ref)
            return ref

        return load

    async def answer(self, scope: Json, body: bytes, pin: Json, request_id: str | None) -> AsyncIterator[Any]:
        """A response: {status, headers}, then the parts of its body; or GONE alone. request_id: the head's, which an
        error and this replica's log name."""
        call = _Call(Pin(**pin))
        context = contextvars.copy_context()  # Ray may run several requests in one
        context.run(log_context.request_id.set, request_id)
        context.run(_call.set, call)
        with suppress(FortwoError, OSError):  # the route meets the same error, and words it as its API does
            await asyncio.create_task(self._hold(call.pin.ref), context=context)
        self._names[call.pin.digest] = call.pin.ref
        async for message in self._run(scope, body, context):
            if call.gone:
                yield GONE
                return
            if message["type"] == "http.response.start":
                yield {"status": message["status"], "headers": list(message["headers"])}
            elif message.get("body"):
                yield bytes(message["body"])

    async def _run(self, scope: Json, body: bytes, context: contextvars.Context) -> AsyncIterator[Message]:
        """What the application sends in this context. The client is there until the generator is closed."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            message = next(received, None)
            return message if message is not None else await asyncio.Future()

        async def send(message: Message) -> None:
            sent.put_nowait(message)

        running = asyncio.create_task(self._application(scope, receive, send), context=context)
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()

    async def _application(self, scope: Json, receive: Any, send: Any) -> None:
        await self._app({**scope, "type": "http", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    async def prepare(self, pin: Json) -> Json:
        """Load and check what will be current soon. `error` is why it cannot be served here."""
        wanted = Pin(**pin)
        try:
            await self._hold(wanted.ref)
            await self._state.load(wanted.ref)  # Serve does not know what the registry has unloaded since
            await self._check(wanted)
        except FortwoError as error:
            full = isinstance(error, Unavailable) and error.code == Unavailable.code
            return self._told(None if full else error)  # all in memory are in use: it was checked, and is loaded later
        return self._told(None)

    async def _check(self, pin: Pin) -> None:
        version = await run_in_threadpool(self._state.registry.version_of, pin.ref)
        if version is not None:
            pin.check(version.digest)
        self._names[pin.digest] = pin.ref

    async def unload(self, refs: Sequence[str]) -> Json:
        """Drop versions from memory. `error`: requests use one of them."""
        for ref in refs:
            try:
                with suppress(NotFound):
                    await run_in_threadpool(self._state.registry.unload_adapter, ref)
            except FortwoError as error:
                return self._told(error)
        return self._told(None)

    def _told(self, error: FortwoError | None) -> Json:
        return {**self._who(), "error": None if error is None else error.body()["error"]}

    def _who(self) -> Json:
        context = serve.get_replica_context()
        return {"id": context.replica_id.unique_id, "machine": socket.gethostname(), "pid": os.getpid()}

    async def describe(self) -> Json:
        """Where it runs, what it holds and does, and the tokens since its start."""
        loaded, counted = self._state.registry.state(), self._state.engine.statistics
        self._names = {digest: name for digest, name in self._names.items() if digest in loaded.adapters}
        return {
            **self._who(),
            "prompt_tokens": counted.prompt_tokens,
            "generation_tokens": counted.generated_tokens,
            "replies": self._state.admission.active,
            "bases": sorted(id for id, model in loaded.models.items() if model.state == "loaded"),
            "adapters": sorted(self._names.get(digest, digest) for digest in loaded.adapters),
        }

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica whose device does not answer."""
        await asyncio.wrap_future(self._state.engine.call(lambda: None))
