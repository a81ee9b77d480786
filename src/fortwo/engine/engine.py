"""The engine: the thread that owns the device and takes turns between requests and a job.

A turn carries out what other threads asked for, runs one decode step for all running requests of each base and a part
of the waiting prompts, for users' requests and, unless these are owed time, for those that jobs make themselves, and
then one micro-step of the job, unless requests are owed time. Every accepted request ends, whatever happens. This
module knows no HTTP, no files and no adapter names; the renderer makes text, the scheduler decides who is next.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fortwo import hardware
from fortwo.engine import malloc_tuning, sampling
from fortwo.engine.generation import JsonConstraint, Reply, ReplyTokenizer
from fortwo.engine.prompt_outputs import PromptOutputs
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import FairShare, Scheduler, Sequence, split_budget
from fortwo.engine.statistics import BaseLoad, EngineStatistics
from fortwo.engine.tasks import Task
from fortwo.errors import Conflict, InvalidRequest, NotFound, Unavailable, UnsupportedModel
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import MAX_RUNNING, NON_FINITE_LOGITS, Delta, FinishReason, Prompt, Sampling
from fortwo.records import AdapterVersion, TrainEvent

log = logging.getLogger(__name__)
T = TypeVar("T")

CORES = min(torch.get_num_threads(), hardware.cores())  # read before an engine changes the number
PROMPT_TOKENS = 2048  # prompt tokens computed in a turn when no reply is running
PROMPT_TOKENS_WHILE_DECODING = 256  # the same while replies run, and for a job's prompts; bounds how long others wait
DAMAGED = "Its weights, or those of its adapter, are damaged: fetch the base again, or take another version."
POLL_SECONDS = 0.05  # how often a job is advanced that waits although no request runs


@dataclass(eq=False, kw_only=True)
class _Request(Sequence):
    reply: Reply
    sampler: sampling.Sampler
    listener: PromptOutputs | None
    accepted: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)  # of the HTTP request or the job that asks


@dataclass(eq=False)
class _Base:
    """users, background: the requests of users and those of jobs. They never share a turn."""

    id: str
    runner: Runner
    tokenizer: ReplyTokenizer
    statistics: EngineStatistics = field(default_factory=EngineStatistics)
    users: Scheduler[_Request] = field(default_factory=lambda: Scheduler(MAX_RUNNING))
    background: Scheduler[_Request] = field(default_factory=lambda: Scheduler(MAX_RUNNING))

    @property
    def requests(self) -> list[_Request]:
        return [*self.users, *self.background]

    def scheduler_of(self, request: _Request) -> Scheduler[_Request]:
        return self.background if request.background else self.users

    def max_reply_tokens(self, prompt: Prompt) -> int:
        """How many tokens the reply may have at most. Raises InvalidRequest for a prompt that is empty or does not
        fit."""
        context, bound = self.runner.decoder.config.context, self.runner.cache.longest
        left = bound - len(prompt.tokens)
        if not prompt.tokens:
            raise InvalidRequest("The prompt is empty.", param="messages", hint="Send at least one token.")
        if left < min(1, prompt.sampling.max_tokens):
            raise InvalidRequest(
                f"The prompt has {len(prompt.tokens)} tokens, but the {'cache' if bound < context else 'context'} of "
                f"{prompt.base!r} holds {bound}, including the reply.",
                param="messages",
                hint=f"Shorten the messages{', or raise FORTWO_CACHE_MB' if bound < context else ''}.",
            )
        return min(left, prompt.sampling.max_tokens)

    def remove(self, request: _Request) -> None:
        self.scheduler_of(request).remove(request)
        self.runner.release(request)

    def end(self, request: _Request, reason: FinishReason, error: str | None = None) -> None:
        try:
            self.remove(request)
        finally:
            request.reply.end(reason, error)

    def decode(self, scheduler: Scheduler[_Request]) -> None:
        """Compute one token for every request of the scheduler whose prompt is computed."""
        for request in scheduler.decoding:  # oldest first
            while request.slot is not None and self._allocate(request, self.runner.extend) is False:
                self.preempt((self.background.running or self.users.running)[-1])
        if decoding := scheduler.decoding:
            self.statistics.batch_rows.observe(len(decoding))
            _advance(self, decoding, lambda: self.runner.step(decoding))

    def preempt(self, request: _Request) -> None:
        """Free the request's slot because the cache is full; it is computed again when there is room."""
        full = "The cache is full: a request of %d tokens is preempted and waits again."
        request.context.run(log.info, full, len(request.tokens))
        self.statistics.preemptions += 1
        self.runner.release(request, keep=False)
        self.scheduler_of(request).preempt(request)

    def prefill(self, scheduler: Scheduler[_Request]) -> None:
        """Compute a part of the scheduler's prompts, and the first token of those that this completes."""
        holds_up_others = scheduler is self.background or scheduler.decoding
        budget = PROMPT_TOKENS_WHILE_DECODING if holds_up_others else PROMPT_TOKENS
        while scheduler.waiting and scheduler.admits(self.runner.unread(scheduler.waiting[0]), budget):
            request = scheduler.waiting[0]
            found = self._allocate(request, self.runner.open)
            if found is False and scheduler is self.users and len(self.background.running) > 1:  # one goes on
                self.preempt(self.background.running[-1])
                continue
            if found is False:
                break
            if found:
                scheduler.start()
                if request.slot is not None and not request.reply.tokens:
                    request.reply.cached_tokens = request.slot.length
                    self.count_prompt(request)
        prefilling = scheduler.prefilling
        lengths = split_budget([request.uncomputed for request in prefilling], budget)
        parts = [(request, length) for request, length in zip(prefilling, lengths, strict=True) if length]
        if parts:
            requests, lengths = [request for request, _ in parts], [length for _, length in parts]
            _advance(self, requests, lambda: self.runner.prefill(requests, lengths))

    def count_prompt(self, request: _Request) -> None:
        if not request.background:
            self.statistics.prompt_tokens += len(request.tokens)
            self.statistics.cached_tokens += request.reply.cached_tokens

    def count_token(self, request: _Request) -> None:
        """Count one token of a reply, before it is added."""
        if request.background:
            return
        self.statistics.generated_tokens += 1
        if len(request.tokens) == len(request.reply.prompt.tokens):
            self.statistics.first_token_seconds.observe(time.perf_counter() - request.accepted)

    def _allocate(self, request: _Request, allocate: Callable[[_Request], bool]) -> bool | None:
        """Whether the cache had room for the request; None when the allocation failed, which ends the request."""
        try:
            return allocate(request)
        except Exception as error:
            failed = "Allocating memory for a request of %d tokens failed."
            request.context.run(log.exception, failed, len(request.tokens))
            self.end(request, "error", f"{type(error).__name__}: {error}")
            return None

    def check_idle(self) -> None:
        """Empty the cache and log an error if a slot is taken although no request is left."""
        try:
            self.runner.cache.check_idle()
        except AssertionError:
            log.exception("The cache of %s is emptied.", self.id)
            self.runner.cache.clear()


class Engine:
    """prompts.Serving, for any thread. threads: CPU threads of the device's thread, None for torch's choice. flush:
    called on the device's thread after the deltas of a step have gone to all on_delta callbacks."""

    def __init__(self, threads: int | None = None, flush: Callable[[], None] = lambda: None) -> None:
        self._statistics = EngineStatistics()
        self._threads = CORES if threads is None else threads
        self._flush = flush
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fortwo-device", daemon=True)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # held to accept a command or to close
        self._closed = False
        self._failure: str | None = None  # why the device does not work any more
        self._stopping = False
        self._bases: dict[str, _Base] = {}
        self._tasks: deque[Task[Any]] = deque()
        self._share = FairShare()  # of the jobs' micro-steps
        self._background_share = FairShare()  # of the requests that jobs make themselves
        self._background_prefills = False  # whether their last turn was of prompts, not of tokens of replies
        self._holes = malloc_tuning.Holes()
        self._stalled = False  # the job waits although no request runs: advance it again after POLL_SECONDS

    # ------------------------------------------------------------ any thread

    @property
    def name(self) -> str:
        """Who computes the replies, for reports."""
        return "fortwo"

    @property
    def elsewhere(self) -> bool:
        return False

    @property
    def statistics(self) -> EngineStatistics:
        return self._statistics

    @property
    def failed(self) -> bool:
        """Whether the device does not work any more."""
        return self._failure is not None

    def start(self) -> None:
        """Start the device's thread. From then on it alone computes with several CPU threads: if a second one did,
        OpenMP would have more threads than cores and put them to sleep between operations, 20,000 times a step."""
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(1)

    def close(self) -> None:
        """Cancel the job and every request, then end the thread. Commands accepted before are carried out."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._commands.put(self._stop)
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def call(self, fn: Callable[[], T]) -> Future[T]:
        """Run fn on the device's thread, between two steps. Raises Unavailable once the engine is closed."""
        future: Future[T] = Future()
        context = copy_context()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(context.run(fn))
                except BaseException as error:
                    future.set_exception(error)

        self._post(run)
        return future

    def add_base(self, id: str, runner: Runner, tokenizer: ReplyTokenizer) -> None:
        """Serve this base from now on. tokenizer: its renderer. Raises Conflict if the id is already served."""

        def add() -> None:
            if id in self._bases:
                raise Conflict(f"Base model {id!r} is already served.", param="model")
            runner.warm()
            self._bases[id] = _Base(id, runner, tokenizer, self._statistics)

        self.call(add).result()

    def remove_base(self, id: str) -> None:
        """Stop serving a base. Raises Conflict while requests use it."""

        def remove() -> None:
            if count := len(self._base(id).requests):
                raise in_use(id, count)
            del self._bases[id]

        self.call(remove).result()

    def check_lora(self, name: str, config: LoraConfig) -> None:
        """Raises InvalidRequest for an adapter that cannot be served, naming what is at fault. name: of the adapter."""

    def attach(self, base: str, key: str, lora: Lora, *, version: AdapterVersion | None = None) -> None:
        """Serve `lora` under `key`, in place of what `key` named before. version: what it is, and then its tensors
        never change; None for an adapter in training."""
        self.call(lambda: self._base(base).runner.attach(key, lora, frozen=version is not None)).result()

    def detach(self, base: str, key: str) -> None:
        """Stop serving the adapter `key`; requests that still use it are cancelled."""

        def detach() -> None:
            served = self._base(base)
            for request in served.requests:
                if request.adapter == key:
                    served.end(request, "cancelled")
            served.runner.detach(key)

        self.call(detach).result()

    def count_requests(self, base: str, adapter: str | None = None) -> int:
        """How many requests run or wait on a base, or on one adapter of it."""
        served = self._base(base)
        return self.call(lambda: sum(adapter in (None, request.adapter) for request in served.requests)).result()

    def loads(self) -> list[BaseLoad]:
        """What each base does now, as another thread sees it: nothing waits for the device."""
        loads = []
        for base in list(self._bases.values()):
            cache, schedulers = base.runner.cache, (base.users, base.background)
            running = sum(len(scheduler.running) for scheduler in schedulers)
            waiting = sum(len(scheduler.waiting) for scheduler in schedulers)
            loads.append(BaseLoad(base.id, running, waiting, cache.tokens, cache.bound))
        return loads

    def unread(self, prompt: Prompt) -> int:
        """How many of a prompt's tokens would have to be computed now. Another thread may ask: nothing waits for the
        device. Raises NotFound for a base that is not loaded."""
        return self._base(prompt.base).runner.unread(Sequence(list(prompt.tokens), prompt.adapter))

    def ready(self) -> Future[None]:
        """Done once the device has had its turn; another engine's has more to wait for."""
        return self.call(lambda: None)

    def has_job(self) -> bool:
        """Whether a job runs or waits."""
        return self.call(lambda: bool(self._tasks)).result()

    def submit(self, prompt: Prompt, on_delta: Callable[[Delta], None] | None = None) -> Reply:
        """Accept a request. on_delta is called on the device's thread and must not block.

        Raises InvalidRequest for a prompt that does not fit and for a schema that cannot be followed (checking it may
        take a second), NotFound for weights that are not loaded, Unavailable once the engine is closed.
        """
        base = self._base(prompt.base)
        _check_adapter(base, prompt.adapter)
        reply = Reply(prompt, base.max_reply_tokens(prompt), base.tokenizer, on_delta)
        sampler = sampling.Sampler(prompt.sampling, prompt.tokens, compile_constraint(base.tokenizer, prompt.sampling))
        outputs = PromptOutputs(prompt, base.runner.decoder) if PromptOutputs.wanted(prompt) else None
        request = _Request(list(prompt.tokens), prompt.adapter, reply=reply, sampler=sampler, listener=outputs)
        request.background = prompt.background

        def accept() -> None:
            try:
                if self._base(prompt.base) is not base:
                    raise Conflict(f"Base model {prompt.base!r} was reloaded meanwhile.")
                _check_adapter(base, prompt.adapter)
            except (NotFound, Conflict) as error:  # unloaded since `submit` checked
                reply.end("error", error.message)
            else:
                base.scheduler_of(request).add(request)

        self._post(accept)
        return reply

    def run_task(self, events: Generator[TrainEvent, None, T], on_event: Callable[[TrainEvent], None]) -> Task[T]:
        """Advance a job between decode steps, and of several jobs each in turn. on_event is called on the device's
        thread; an exception of it ends the job. Raises Unavailable once the engine is closed."""
        task = Task(events, on_event, wake=lambda: self._commands.put(lambda: None))
        self._post(lambda: self._tasks.append(task))
        return task

    def _post(self, command: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            command()
            return
        with self._gate:
            if self._failure is not None:
                raise _failed(self._failure)
            if self._closed:
                raise Unavailable("The server is shutting down.", hint="Try again when it is back.")
            self._commands.put(command)

    def _base(self, id: str) -> _Base:
        if id not in self._bases:
            raise not_loaded(id)
        return self._bases[id]

    # ------------------------------------------------------------ the device's thread

    def _run(self) -> None:
        malloc_tuning.retain_freed_memory()
        torch.get_num_threads()  # a thread's first call copies the process's number; later it would undo the next line
        torch.set_num_threads(self._threads)
        self._ready.set()
        try:
            while not self._stopping:
                self._run_commands()
                began = time.perf_counter()
                self._serve()
                self._share.requests_ran(time.perf_counter() - began)
                self._advance_job()
                self._flush()
            self._end_all()
        except Exception as error:
            log.exception("The device failed. Nothing is computed any more until the server is started again.")
            self._fail(f"{type(error).__name__}: {error}")
        self._flush()

    @property
    def _busy(self) -> bool:
        return any(base.requests for base in self._bases.values())

    def _run_commands(self) -> None:
        """Carry out the commands of other threads; if there is nothing else to do, wait for one."""
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
        """Take a turn for the requests of users, then one for those of jobs unless users' are owed device time."""
        bases, share = list(self._bases.values()), self._background_share
        for base in bases:
            for request in base.requests:
                if request.reply.cancel_requested:
                    base.end(request, "cancelled")
        began = time.perf_counter()
        self._serve_users(bases)
        served = time.perf_counter()
        share.requests_ran(served - began)
        if share.job_may_run(requests=any(base.users.running for base in bases)):
            self._serve_background(bases)
            share.job_ran(time.perf_counter() - served)
        for base in bases:
            if not base.requests:
                base.check_idle()
        self._flush()

    def _serve_users(self, bases: list[_Base]) -> None:
        """Compute one token for every running request and a part of the prompts of the others."""
        for base in bases:
            if len(base.users):
                base.decode(base.users)
                self._flush()
                base.prefill(base.users)

    def _serve_background(self, bases: list[_Base]) -> None:
        """Do one of the two, in turn: a user who comes now does not wait for both."""
        self._background_prefills = not self._background_prefills
        for base in bases:
            if self._background_prefills:
                base.prefill(base.background)
            else:
                base.decode(base.background)

    def _advance_job(self) -> None:
        """Run one micro-step of the next job, unless requests are owed device time."""
        if not self._tasks or self._stopping or not self._share.job_may_run(requests=self._busy):
            return
        task = self._tasks[0]
        began, waited = time.perf_counter(), task.waiting
        for base in self._bases.values():
            base.runner.cache.trim()
        task.advance()
        self._share.job_ran(time.perf_counter() - began)
        self._tasks.rotate(-1)
        if task.done:
            self._tasks.pop()
        if task.done or (task.waiting and not waited):
            self._holes.close()
        elif not task.waiting:
            self._holes.after_step()
        self._stalled = bool(self._tasks) and all(one.waiting for one in self._tasks) and not self._busy

    def _stop(self) -> None:
        self._stopping = True

    def _fail(self, reason: str) -> None:
        """End everything without the device, which does not work any more."""
        with self._gate:
            self._closed = True
            self._failure = reason
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
        for task in self._tasks:
            task.end(_failed(reason))
        for request in (request for base in self._bases.values() for request in base.requests):
            request.reply.fail(_failed(reason))

    def _end_all(self) -> None:
        while self._tasks:
            self._tasks.popleft().end()
        for base in self._bases.values():
            for request in base.requests:
                base.end(request, "cancelled")


def in_use(base: str, requests: int) -> Conflict:
    return Conflict(
        f"Base model {base!r} cannot be removed: {requests} request(s) use it.",
        param="model",
        hint="Try again when they are done.",
    )


def not_loaded(base: str) -> NotFound:
    return NotFound(f"Base model {base!r} is not loaded.", param="model", hint="Load it first.")


def _failed(reason: str) -> Unavailable:
    return Unavailable(f"The device failed: {reason}.", hint="Start the server again.")


def _check_adapter(base: _Base, key: str | None) -> None:
    if key is not None and not base.runner.has(key):
        raise NotFound(f"Adapter {key!r} is not loaded on {base.id!r}.", param="model", hint="Load it first.")


def compile_constraint(tokenizer: ReplyTokenizer, params: Sampling) -> JsonConstraint | None:
    """What the request asks the reply to conform to. Raises InvalidRequest for a schema or a grammar that cannot be
    followed."""
    if params.grammar is not None:
        return tokenizer.grammar_constraint(params.grammar)
    return None if params.json_schema is None else tokenizer.constraint(params.json_schema)


def _advance(base: _Base, requests: list[_Request], forward: Callable[[], Tensor]) -> None:
    """Run `forward` and add one token to each request that it completed. A failed forward ends all its requests, a
    failed row only its own."""
    try:
        logits_BV = forward()
        requests = [request for request in requests if request.uncomputed == 0]
        rows = sampling.sample(logits_BV, [request.sampler for request in requests])
    except Exception as error:
        log.exception("A forward of %d request(s) failed.", len(requests))
        for request in requests:
            request.context.run(log.error, "A reply ends because its forward failed.")
            base.end(request, "error", f"{type(error).__name__}: {error}")
        return
    for request, sampled in zip(requests, rows, strict=True):
        if isinstance(sampled, str):
            if sampled == NON_FINITE_LOGITS:
                request.reply.fail(UnsupportedModel(sampled, param="model", hint=DAMAGED))
            base.end(request, "error", sampled)
            continue
        try:
            if request.listener is not None:
                request.reply.add_prompt_outputs(request.listener.logprobs, request.listener.embedding)
                request.listener = None
            if request.reply.max_tokens:
                base.count_token(request)
                request.tokens.append(sampled.token)
                request.reply.push(*sampled)
            else:
                request.reply.end("length")
        except Exception as error:
            request.context.run(log.exception, "Turning a token into text failed.")
            request.reply.end("error", f"{type(error).__name__}: {error}")
        if request.reply.done:
            base.remove(request)
