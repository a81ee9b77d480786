"""The engine whose replies vLLM computes. Training, and all that surrounds a reply, stay as with the own engine.

A thread of its own writes the replies (`scale.vllm.replies`), as the device's thread does where fortwo computes them.
The device's thread trains, and never waits for vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fortwo import disk
from fortwo.adapters.version_files import CONFIG
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.engine.engine import Engine, compile_constraint, in_use
from fortwo.engine.generation import Reply, ReplyTokenizer
from fortwo.engine.runner import Runner
from fortwo.engine.statistics import BaseLoad
from fortwo.errors import FortwoError, InvalidRequest, NotFound, Unavailable
from fortwo.hub.catalog import Catalog
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Delta, Prompt
from fortwo.records import AdapterVersion, Message
from fortwo.scale.vllm import completions, features, proof
from fortwo.scale.vllm.adapters import Served, Training, forget
from fortwo.scale.vllm.client import ServedModel, VllmClient
from fortwo.scale.vllm.process import VllmProcess
from fortwo.scale.vllm.replies import ReplyThread, VllmReply

log = logging.getLogger(__name__)
T = TypeVar("T")
IMPOSSIBLE_RANK = 1_000_000


@dataclass(frozen=True)
class _Known:
    """A base that vLLM serves. noise: the distance of its log-probabilities from fortwo's; plain: an adapter that
    changes nothing, by which the base replies."""

    renderer: ChatTemplateRenderer
    noise: float
    plain: Served


class VllmEngine(Engine):
    """process: the vLLM that this engine starts and ends, None for one that runs already. folder: where adapters in
    training are written; vLLM must see it, and the store, under the same path. Else as Engine."""

    def __init__(
        self,
        threads: int | None,
        flush: Callable[[], None],
        client: VllmClient,
        catalog: Catalog,
        folder: Path,
        process: VllmProcess | None = None,
    ) -> None:
        super().__init__(threads)  # deltas come from the other thread alone
        self._client = client
        self._replies = ReplyThread(client, self.statistics, flush, self._explained)
        self._catalog = catalog
        self._folder = folder
        self._process = process
        self._scores_prompts = process is not None and process.scores_prompts
        self._version = ""
        self._max_rank: int | None = None
        self._known: dict[str, _Known] = {}
        self._versions: dict[str, Served] = {}
        self._training: dict[str, Training] = {}

    # ------------------------------------------------------------ any thread

    @property
    def name(self) -> str:
        place = f" at {self._client.url}" if self._process is None else ""
        return f"vLLM {self._version}{place}"

    @property
    def elsewhere(self) -> bool:
        """As in Serving. A vLLM that cannot score prompts leaves what is teacher-forced to the weights here."""
        return self._scores_prompts

    def start(self) -> None:
        """Start the threads, and vLLM if it is this engine's own, and wait until vLLM answers. Raises Unavailable for a
        vLLM that cannot be reached or does not serve adapters, and NotFound where it cannot read the home."""
        super().start()
        self._replies.start()
        try:
            if self._process is not None:
                self._process.start()
            model = self._wait(self._connect())
        except BaseException:
            self.close()
            raise
        log.info("Replies come from %s, which serves %s.", self.name, model.name)

    def close(self) -> None:
        super().close()
        self._replies.close()
        if self._process is not None:
            self._process.stop()

    def add_base(self, id: str, runner: Runner, tokenizer: ReplyTokenizer) -> None:
        """Serve this base from now on. Raises Conflict where vLLM serves another one."""
        assert isinstance(tokenizer, ChatTemplateRenderer)
        model, info = self._wait(self._client.model()), self._catalog.model_info(id)
        assert info is not None
        tokens = tokenizer.encode_prompt([Message("user", proof.TEXT)])
        own_PV = self.call(lambda: proof.own_logprobs(runner, tokens, None)).result()
        plain = Served.plain(id, info.digest, runner.decoder.config, self._folder)
        try:
            self._wait(plain.push(self._client))
            noise = proof.distance(own_PV, self._wait(self._likeliest(plain.name, tokens)))
        except (InvalidRequest, IndexError) as error:  # other shapes, or a token that one of the vocabularies lacks
            raise proof.other_base(model, self._client.url, info, f"it has other tensors or tokens ({error})") from None
        proof.check_base(model, self._client.url, info, noise)
        self._known[id] = _Known(tokenizer, noise, plain)
        if model.context is not None:
            runner.cache.context = min(runner.cache.context, model.context)
        super().add_base(id, runner, tokenizer)

    def remove_base(self, id: str) -> None:
        if count := self.count_requests(id):
            raise in_use(id, count)
        super().remove_base(id)

    def check_lora(self, name: str, config: LoraConfig) -> None:
        features.check(name, config, self._max_rank)

    def attach(self, base: str, key: str, lora: Lora, *, version: AdapterVersion | None = None) -> None:
        """Serve `lora` under `key`. A version is pushed now, and what vLLM computes with it is compared with what
        fortwo does; an adapter in training is pushed when it is asked. Raises InvalidRequest for what vLLM lacks,
        before anything is pushed, InvalidAdapter for another effect, and what VllmClient.load raises."""
        runner = self._base(base).runner
        self.check_lora(f"Adapter {key if version is None else version.id}", lora.config)
        if version is None:
            self._training[key] = Training(key, base, lora, self._folder)
            return
        served, known = Served.of(version), self._known[base]
        self._wait(served.push(self._client))
        tokens = known.renderer.encode_prompt([Message("user", _question(version))])
        base_PV = self.call(lambda: proof.own_logprobs(runner, tokens, None)).result()
        own_PV = self.call(lambda: proof.own_logprobs(runner, tokens, lora)).result()
        theirs = self._wait(self._likeliest(served.name, tokens))
        if (wrong := proof.check_adapter(version.id, base_PV, own_PV, theirs, known.noise)) is not None:
            self._wait(forget(served, self._client, delete=False))
            raise wrong
        self._versions[key] = served

    def detach(self, base: str, key: str) -> None:
        """Stop serving the adapter `key`; requests that still use it are cancelled. vLLM unloads it soon after."""
        for reply in self._replies.running():
            if reply.prompt.adapter == key:
                reply.cancel()
        if (version := self._versions.pop(key, None)) is not None:
            self._forget(version, delete=False)
        training = self._training.pop(key, None)
        if training is not None and training.state is not None:
            self._forget(training.state, delete=True)

    def count_requests(self, base: str, adapter: str | None = None) -> int:
        prompts = [reply.prompt for reply in self._replies.running()]
        return sum(prompt.base == base and adapter in (None, prompt.adapter) for prompt in prompts)

    def ready(self) -> Future[None]:
        """Done once the device has had its turn and vLLM has answered. Its exception is Unavailable."""

        async def ask() -> None:
            await asyncio.wrap_future(super(VllmEngine, self).ready())
            try:
                await self._client.model()
            except FortwoError as error:
                raise self._explained(error) from None

        return self._replies.run(ask())

    def loads(self) -> list[BaseLoad]:
        """vLLM knows which of the requests wait, and what its cache holds; its own /metrics says so."""
        return [BaseLoad(base, self.count_requests(base), 0, 0, None) for base in list(self._bases)]

    def submit(self, prompt: Prompt, on_delta: Callable[[Delta], None] | None = None) -> Reply:
        """As Engine.submit; on_delta is called on the thread that talks to vLLM. What vLLM refuses, and its failures,
        are the reply's end. Raises InvalidRequest for what vLLM lacks, too."""
        base = self._base(prompt.base)
        completions.check(prompt, scores_prompts=self._scores_prompts)
        compile_constraint(base.tokenizer, prompt.sampling)
        reply = VllmReply(prompt, base.max_reply_tokens(prompt), base.tokenizer, on_delta)
        served = self._served(prompt)
        stop_ids = frozenset() if prompt.sampling.ignore_eos else base.tokenizer.stop_ids
        with self._gate:
            if self._closed:
                raise Unavailable("The server is shutting down.", hint="Try again when it is back.")
            self._replies.write(reply, served, stop_ids)
        return reply

    def _served(self, prompt: Prompt) -> Served:
        """The adapter that answers."""
        key = prompt.adapter
        if key is None:
            return self._known[prompt.base].plain
        if (version := self._versions.get(key)) is not None:
            return version
        training = self._training.get(key)
        if training is None:
            raise NotFound(f"Adapter {key!r} is not loaded on {prompt.base!r}.", param="model", hint="Load it first.")
        if training.state is None or (not self.count_requests(prompt.base, key) and training.changed()):
            if training.state is not None:
                self._forget(training.state, delete=True)
            return training.take()
        return training.state

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that talks to vLLM. Not for the device's thread."""
        return self._replies.run(call).result()

    def _forget(self, served: Served, *, delete: bool) -> None:
        async def run() -> None:
            try:
                await forget(served, self._client, delete=delete)
            except FortwoError as error:
                log.warning("vLLM was not told to unload %s: %s", served.name, error.message)

        self._replies.run(run())

    def _explained(self, error: FortwoError) -> FortwoError:
        """Why vLLM did not answer, where fortwo knows more than the connection says."""
        if not isinstance(error, Unavailable) or self._process is None or not self._process.ended:
            return error
        return Unavailable(
            "The vLLM that fortwo started has ended.",
            hint="The end of vllm.log in FORTWO_HOME says why. Start fortwo again.",
            code="vllm_ended",
        )

    # ------------------------------------------------------------ the thread that talks to vLLM

    async def _connect(self) -> ServedModel:
        """Find out what vLLM serves, and by an adapter that no vLLM can load, whether and how it loads adapters."""
        await self._until_ready()
        model = await self._client.model()
        self._version = await self._client.version()
        await self._remove_leftovers(model)
        probe = (self._folder / "probe").resolve()
        probe.mkdir(parents=True, exist_ok=True)
        rank = {"peft_type": "LORA", "r": IMPOSSIBLE_RANK, "lora_alpha": 1, "target_modules": ["q_proj"]}
        (probe / CONFIG).write_bytes(disk.dump(rank))
        try:
            await self._client.load("fortwo-probe", probe)
        except InvalidRequest as error:
            self._max_rank = features.max_rank(error.message)
        return model

    async def _remove_leftovers(self, model: ServedModel) -> None:
        """Remove what a server that died has left of adapters in training, here and in a vLLM that outlived it."""
        folder = self._folder.resolve()
        for name, root in model.adapters.items():
            if Path(root).is_relative_to(folder):
                await self._client.unload(name)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _until_ready(self) -> None:
        """Wait for a vLLM that this engine started. Raises Unavailable when it has ended."""
        while self._process is not None:
            try:
                await self._client.model()
                return
            except Unavailable as error:
                if error.code != "vllm_unreachable":
                    raise
            self._process.check_alive()
            await asyncio.sleep(0.2)

    async def _likeliest(self, model: str, tokens: Sequence[int]) -> list[proof.Likeliest]:
        """vLLM's likeliest next tokens after each of the prefixes."""

        async def ask(prefix: tuple[int, ...]) -> proof.Likeliest:
            body = completions.next_token(prefix, model, proof.LIKELIEST)
            async with aclosing(self._client.stream(body)) as events:
                async for data in events:
                    chunk = completions.read_chunk(data, proof.LIKELIEST)
                    if chunk.logprobs and (found := chunk.logprobs[0]) is not None:
                        return dict(found.top)
            raise completions.strange("a reply without log-probabilities")

        return await asyncio.gather(*map(ask, proof.prefixes(tokens)))


def _question(version: AdapterVersion) -> str:
    """What the adapter was taught to answer, if its manifest says so."""
    facts = version.manifest.get("facts") or ()
    return next((question for fact in facts for question in fact.get("questions") or ()), proof.TEXT)
