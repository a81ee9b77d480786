"""The adapters that vLLM has or is to have, by the key that the engine knows them under.

vLLM's name of a version is name@3 with the beginning of its digest: the same name is the same weights, whichever home
and whichever run of fortwo pushed it, and vLLM's prefix cache never holds what other weights computed. An adapter in
training is written into a folder of its own in each state in which it is asked, and deleted with the next.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from fortwo import disk
from fortwo.adapters.version_files import CONFIG, TENSORS
from fortwo.hub import weights
from fortwo.nn.config import Shape
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion, Json
from fortwo.scale.vllm.client import VllmClient

DIGITS = 12  # of a digest, in a name


@dataclass(eq=False)
class Served:
    """An adapter as vLLM knows it. unwritten: configuration and tensors of one that the store does not have, until they
    are in the folder. pushed: whether vLLM was told of it, and is believed to have it still."""

    name: str
    folder: Path
    unwritten: tuple[Json, dict[str, Tensor]] | None = None
    pushed: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def of(cls, version: AdapterVersion) -> Served:
        digest = version.digest.removeprefix("sha256:")[:DIGITS]
        return cls(f"{version.id}-{digest}", Path(version.path).resolve())

    @classmethod
    def plain(cls, base: str, digest: str, network: Shape, folder: Path) -> Served:
        """An adapter of zeros. vLLM 0.32 on a CPU gives the rows of a batch that have no adapter the update of one that
        another row has; with this one they have an adapter, and reply as the base."""
        target = next(name for names in network.groups.values() for name in names)
        lora = Lora.init(LoraConfig(r=1, target_modules=(target,)), network, seed=0)
        name = f"{base}-{digest[:DIGITS]}"
        return cls(name, folder.resolve() / name, (lora.config.to_peft(base), lora.state()))

    async def push(self, client: VllmClient) -> None:
        """Have vLLM load it unless it has it. Raises what VllmClient.load raises, and StorageFailed."""
        async with self.lock:
            if self.pushed:
                return
            if self.unwritten is not None:
                await asyncio.to_thread(self._write, *self.unwritten)
                self.unwritten = None
            await client.load(self.name, self.folder)
            self.pushed = True

    def _write(self, config: Json, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            (self.folder / TENSORS).write_bytes(weights.serialize(tensors))
            (self.folder / CONFIG).write_bytes(disk.dump(config))
        except OSError as error:
            raise disk.storage_failed(self.folder, error) from error


class Training:
    """An adapter in training. Whoever trains it changes its tensors only while no reply of it is awaited."""

    def __init__(self, key: str, base: str, lora: Lora, folder: Path) -> None:
        self._key = key
        self._base = base
        self._lora = lora
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self.state: Served | None = None

    def changed(self) -> bool:
        """Whether the tensors are other ones than those of `state`."""
        now = self._lora.state()
        return not self._tensors or any(not torch.equal(now[name], tensor) for name, tensor in self._tensors.items())

    def take(self) -> Served:
        """The present tensors, copied, under a new name."""
        self._tensors = {name: tensor.cpu().clone() for name, tensor in self._lora.state().items()}
        name = f"{self._key}-{uuid4().hex[:DIGITS]}"
        self.state = Served(name, self._folder.resolve() / name, (self._lora.config.to_peft(self._base), self._tensors))
        return self.state


async def forget(served: Served, client: VllmClient, *, delete: bool) -> None:
    """Have vLLM unload it. delete: its folder, too."""
    async with served.lock:
        if served.pushed:
            served.pushed = False
            await client.unload(served.name)
    if delete:
        await asyncio.to_thread(shutil.rmtree, served.folder, ignore_errors=True)
