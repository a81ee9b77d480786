"""The one owner of the device: a thread that takes turns between requests and a job.

A turn: what other threads asked for, one decode step for all running requests of each base, a part of the prompts of
those that waited, then one micro-step of the job, if nobody is owed time. Every accepted request ends, come what may.
Knows no HTTP, no files and no names of adapters; text is the renderer's, who is next the scheduler's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fortwo.engine import heap, sampling
from fortwo.engine.generation import Reply, Speech
from fortwo.engine.reading import Reading
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import FairShare, Scheduler, Sequence, shares
from fortwo.engine.tasks import Task
from fortwo.errors import Conflict, InvalidRequest, NotFound, Unavailable
from fortwo.nn.lora import Lora
from fortwo.prompts import MAX_RUNNING, Delta, FinishReason, Prompt
from fortwo.records import TrainEvent

log = logging.getLogger(__name__)
T = TypeVar("T")

CORES = torch.get_num_threads()  # before an engine takes them
PROMPT_TOKENS = 2048  # of prompts that are computed in a turn
PROMPT_TOKENS_BESIDE = 256  # the same while replies run: bounds how long they stand still
TIDY_SECONDS = 20.0  # of a job, after which memory that it freed goes back to the system; half a second goes by that
POLL_SECONDS = 0.05  # how often a job that waits for something else than requests is asked again


@dataclass(eq=False, kw_only=True)
class _Request(Sequence):
    reply: Reply
    sampler: sampling.Sampler
    listener: Reading | None


@dataclass(eq=False)
class _Base:
    id: str
    runner: Runner
    speech: Speech
    scheduler: Scheduler[_Request] = field(default_factory=lambda: Scheduler(MAX_RUNNING))

    def leave(self, request: _Request) -> None:
        self.scheduler.remove(request)
        self.runner.release(request)

    def end(self, request: _Request, reason: FinishReason, error: str | None = None) -> None:
        self.leave(request)
        request.reply.end(reason, error)

    def decode(self) -> None:
        """One token for every request whose prompt is computed."""
        for request in self.scheduler.decoding:  # oldest first
            while request.slot is not None and self._finds_room(request, self.runner.extend) is False:
                self.preempt(self.scheduler.running[-1])
        if decoding := self.scheduler.decoding:
            _advance(self, decoding, lambda: self.runner.step(decoding))

    def preempt(self, request: _Request) -> None:
        """The cache is full: the request gives its slot back and is computed again when there is room."""
        log.info("the cache is full: a request of %d tokens waits again", len(request.tokens))
        self.runner.release(request, keep=False)
        self.scheduler.preempt(request)

    def read(self) -> None:
        """A part of the prompts; the first token for those that are computed wholly now."""
        scheduler = self.scheduler
        budget = PROMPT_TOKENS_BESIDE if scheduler.decoding else PROMPT_TOKENS
        while scheduler.waiting and scheduler.admits(self.runner.unread(scheduler.waiting[0]), budget):
            request = scheduler.waiting[0]
            found = self._finds_room(request, self.runner.open)
            if found is False:
                break
            if found:
                scheduler.start()
                if request.slot is not None and not request.reply.tokens:
                    request.reply.cached_tokens = request.slot.length
        reading = scheduler.reading
        lengths = shares([request.unread for request in reading], budget)
        parts = [(request, length) for request, length in zip(reading, lengths, strict=True) if length]
        if parts:
            requests, lengths = [request for request, _ in parts], [length for _, length in parts]
            _advance(self, requests, lambda: self.runner.prefill(requests, lengths))

    def _finds_room(self, request: _Request, find: Callable[[_Request], bool]) -> bool | None:
        """Whether the cache has room for the request; None when looking for it failed, which ends the request."""
        try:
            return find(request)
        except Exception as error:
            log.exception("no memory for a request of %d tokens", len(request.tokens))
            self.end(request, "error", f"{type(error).__name__}: {error}")
            return None

    def check_idle(self) -> None:
        """Nothing of the cache is taken when nobody is there."""
        try:
            self.runner.cache.check_idle()
        except AssertionError:
            log.exception("the cache of %s is emptied", self.id)
            self.runner.cache.clear()


class Engine:
    """prompts.Serving, for any thread. threads: CPU threads of the device owner, None for torch's choice. on_told:
    called on the device's thread when all requests of a step have been told what it brought, or others something."""

    def __init__(self, threads: int | None = None, on_told: Callable[[], None] = lambda: None) -> None:
        self._threads = CORES if threads is None else threads
        self._on_told = on_told
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fortwo-device", daemon=True)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing is accepted after the gate is closed
        self._closed = False
        self._stopping = False
        self._bases: dict[str, _Base] = {}
        self._tasks: deque[Task[Any]] = deque()
        self._share = FairShare()
        self._tidied = 0.0  # when freed memory went back to the system
        self._stalled = False  # the job waits although no request is there: ask it again, but not at once

    # ------------------------------------------------------------ any thread

    def start(self) -> None:
        """From here on the device's thread is the only one that computes with several CPU threads: where a second one
        does, OpenMP has more threads than cores and puts them to sleep between operations, 20,000 times a step."""
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(1)

    def close(self) -> None:
        """Cancel the job and every request, then let the thread end. Calls that were accepted are carried out."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._commands.put(self._stop)
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def call(self, fn: Callable[[], T]) -> Future[T]:
        """Run fn on the device's thread, between two steps."""
        future: Future[T] = Future()

        def carry_out() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn())
                except BaseException as error:
                    future.set_exception(error)

        self._post(carry_out)
        return future

    def add_base(self, id: str, runner: Runner, speech: Speech) -> None:
        """Serve this base from now on. speech: its renderer."""

        def add() -> None:
            if id in self._bases:
                raise Conflict(f"base model {id!r} is already served", param="model")
            runner.warm()
            self._bases[id] = _Base(id, runner, speech)

        self.call(add).result()

    def remove_base(self, id: str) -> None:
        """Raises Conflict while requests run on it."""

        def remove() -> None:
            if count := len(self._base(id).scheduler):
                raise Conflict(
                    f"base model {id!r} answers {count} request(s)", param="model", hint="Try again when they are done."
                )
            del self._bases[id]

        self.call(remove).result()

    def attach(self, base: str, key: str, lora: Lora, *, frozen: bool = False) -> None:
        """Serve `lora` under `key`; what `key` named before is replaced. frozen: as in Runner.attach."""
        self.call(lambda: self._base(base).runner.attach(key, lora, frozen=frozen)).result()

    def detach(self, base: str, key: str) -> None:
        """Requests that still run on `key` are cancelled."""

        def detach() -> None:
            home = self._base(base)
            for request in home.scheduler:
                if request.adapter == key:
                    home.end(request, "cancelled")
            home.runner.detach(key)

        self.call(detach).result()

    def requests(self, base: str, adapter: str | None = None) -> int:
        """How many requests run or wait on a base, or on one adapter of it."""
        home = self._base(base)
        return self.call(lambda: sum(adapter in (None, request.adapter) for request in home.scheduler)).result()

    def working(self) -> bool:
        """Whether a job runs or waits."""
        return self.call(lambda: bool(self._tasks)).result()

    def submit(self, prompt: Prompt, on_delta: Callable[[Delta], None] | None = None) -> Reply:
        """Accept a request. on_delta is called on the device's thread and must not block.

        Raises InvalidRequest for a prompt that does not fit and for a schema that cannot be followed (which may take
        a second to find out), NotFound for weights that are not here, Unavailable.
        """
        base = self._base(prompt.base)
        _check_adapter(base, prompt.adapter)
        context, bound = base.runner.decoder.config.context, base.runner.cache.longest
        room, asked = bound - len(prompt.tokens), prompt.sampling
        if not prompt.tokens:
            raise InvalidRequest("the prompt is empty", param="messages", hint="Send at least one token.")
        if room < min(1, asked.max_tokens):
            raise InvalidRequest(
                f"the prompt has {len(prompt.tokens)} tokens; the {'cache' if bound < context else 'context'} of "
                f"{prompt.base!r} holds {bound}, the reply included",
                param="messages",
                hint=f"Shorten the messages{', or raise FORTWO_CACHE_MB' if bound < context else ''}.",
            )
        reply = Reply(prompt, min(room, asked.max_tokens), base.speech, on_delta)
        constraint = None if asked.json_schema is None else base.speech.constraint(asked.json_schema)
        sampler = sampling.Sampler(asked, prompt.tokens, constraint)
        reading = Reading(prompt, base.runner.decoder) if Reading.asked(prompt) else None
        request = _Request(
            list(prompt.tokens), prompt.adapter, listener=reading, kept=prompt.kept, reply=reply, sampler=sampler
        )

        def accept() -> None:
            try:
                if self._base(prompt.base) is not base:
                    raise Conflict(f"base model {prompt.base!r} was loaded anew")
                _check_adapter(base, prompt.adapter)
            except (NotFound, Conflict) as gone:  # in the meantime
                reply.end("error", gone.message)
            else:
                base.scheduler.add(request)

        self._post(accept)
        return reply

    def run_task(self, events: Generator[TrainEvent, None, T], on_event: Callable[[TrainEvent], None]) -> Task[T]:
        """Advance a job between decode steps; one at a time, in order. on_event is called on the device's thread;
        what it raises ends the job."""
        task = Task(events, on_event, wake=lambda: self._commands.put(lambda: None))
        self._post(lambda: self._tasks.append(task))
        return task

    def _post(self, command: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            command()
            return
        with self._gate:
            if self._closed:
                raise Unavailable("the server is shutting down", hint="Try again when it is back.")
            self._commands.put(command)

    def _base(self, id: str) -> _Base:
        if id not in self._bases:
            raise NotFound(f"base model {id!r} is not loaded", param="model", hint="Load it first.")
        return self._bases[id]

    # ------------------------------------------------------------ the device's thread

    def _run(self) -> None:
        heap.keep()
        torch.get_num_threads()  # a thread's first call takes the process's number and would undo the next line later
        torch.set_num_threads(self._threads)
        self._ready.set()
        while not self._stopping:
            self._obey()
            began = time.perf_counter()
            self._serve()
            self._share.served(time.perf_counter() - began)
            self._work()
            self._on_told()
        self._end_all()
        self._on_told()

    @property
    def _busy(self) -> bool:
        return any(len(base.scheduler) for base in self._bases.values())

    def _obey(self) -> None:
        """Do what other threads asked for; when there is nothing else to do, wait for it."""
        try:
            if not self._busy and not self._tasks:
                self._commands.get()()
            elif not self._busy and self._stalled:
                self._commands.get(timeout=POLL_SECONDS)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _serve(self) -> None:
        """One token for every running request; a part of the prompts of the others."""
        for base in list(self._bases.values()):
            for request in base.scheduler:
                if request.reply.cancel_requested:
                    base.end(request, "cancelled")
            if len(base.scheduler):
                base.decode()
                self._on_told()
                base.read()
            if not len(base.scheduler):
                base.check_idle()
        self._on_told()

    def _work(self) -> None:
        """One micro-step of the job."""
        if not self._tasks or self._stopping or not self._share.job_may_run(requests=self._busy):
            return
        task = self._tasks[0]
        began, waited = time.perf_counter(), task.waiting
        for base in self._bases.values():
            base.runner.cache.trim()
        task.advance()
        self._share.worked(time.perf_counter() - began)
        if task.done:
            self._tasks.popleft()
        if task.done or (task.waiting and not waited) or began - self._tidied > TIDY_SECONDS:
            heap.give_back()
            self._tidied = time.perf_counter()
        self._stalled = task.waiting and not task.done and not self._busy

    def _stop(self) -> None:
        self._stopping = True

    def _end_all(self) -> None:
        while self._tasks:
            self._tasks.popleft().end()
        for base in self._bases.values():
            for request in base.scheduler:
                base.end(request, "cancelled")


def _check_adapter(base: _Base, key: str | None) -> None:
    if key is not None and not base.runner.has(key):
        raise NotFound(f"adapter {key!r} is not loaded on {base.id!r}", param="model", hint="Load it first.")


def _advance(base: _Base, requests: list[_Request], forward: Callable[[], Tensor]) -> None:
    """One token for each request that is computed wholly then; a failed forward ends all that were in it, a failed
    row only itself."""
    try:
        logits_BV = forward()
        requests = [request for request in requests if request.unread == 0]
        rows = sampling.choose(logits_BV, [request.sampler for request in requests])
    except Exception as error:
        log.exception("a forward of %d request(s) failed", len(requests))
        for request in requests:
            base.end(request, "error", f"{type(error).__name__}: {error}")
        return
    for request, chosen in zip(requests, rows, strict=True):
        if isinstance(chosen, str):
            base.end(request, "error", chosen)
            continue
        try:
            if request.listener is not None:
                request.reply.tell(request.listener.logprobs, request.listener.embedding)
                request.listener = None
            if request.reply.room:
                request.tokens.append(chosen.token)
                request.reply.push(*chosen)
            else:
                request.reply.end("length")
        except Exception as error:
            log.exception("a token could not be turned into text")
            request.reply.end("error", f"{type(error).__name__}: {error}")
        if request.reply.done:
            base.leave(request)
