"""What one worker computes: the gradient of its share of each step, on its own copy of the base.

The process that owns the run has the optimizer, the evaluations and the checkpoints. A worker keeps nothing from step
to step but the base, so another one can take its place at any time. This module knows torch and no Ray.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fortwo.engine import malloc_tuning
from fortwo.engine.networks import read_network
from fortwo.errors import Conflict, NotFound, Unavailable
from fortwo.execution.autotuning import memory
from fortwo.execution.backend import Backend, backend_for
from fortwo.hub.catalog import Catalog
from fortwo.hub.prepared import ModelInfo
from fortwo.kernels import cpu, isa
from fortwo.nn.lora import Lora, Segment
from fortwo.quantization.matmul import take_fp32_kernel
from fortwo.quantization.selection import Measurements
from fortwo.records import Json, Plan
from fortwo.scale.sharded import ShardedLayers, read_sharded
from fortwo.train import plan as plans
from fortwo.train.adapter import lora_config
from fortwo.train.estimate import format_size
from fortwo.train.fit import PER_PARAMETER, fit
from fortwo.train.losses import Accumulated, Row, accumulate_gradients
from fortwo.train.preferences import Preferences
from fortwo.train.retry_policy import RowMix
from fortwo.train.shares import Share


def versions() -> dict[str, str]:
    """The versions by which head and workers must agree; Ray itself compares its own and that of Python."""
    return {name: version(name).partition("+")[0] for name in ("fortwo", "torch")}


@dataclass(frozen=True)
class RunSpec:
    """What every worker of a run needs to know. models_dir: where it reads the base; digest: of the base; weights:
    FORTWO_WEIGHTS with which it trains on the same numbers as the head; isa, threads: as in the settings, for a worker;
    fp32_kernel: the head's; versions: the head's; shard: the setting; parent: the tensors that KTO compares with, if
    the run has a parent."""

    model: str
    digest: str
    models_dir: Path
    weights: str
    plan: Json
    isa: str
    threads: int
    fp32_kernel: str
    versions: dict[str, str]
    shard: bool = False
    parent: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step. number: from 1; rows: all of them; weights_N: the adapter, flat."""

    number: int
    prefix: int
    rows: list[Row]
    mix: RowMix
    weights_N: np.ndarray


@dataclass
class GradientWorker:
    """One worker with its base in memory. reference: the adapters of KTO's reference."""

    backend: Backend
    plan: Plan
    share: Share
    lora: Lora
    flat_N: Tensor
    reference: tuple[Segment, ...]

    @classmethod
    def of(cls, spec: RunSpec, share: Share, device: torch.device, on_node: int = 1) -> GradientWorker:
        """Load the base. on_node: how many workers share the memory of this machine. Raises Conflict where versions or
        the base differ from the head's, and Unavailable where the base does not fit into the memory."""
        check_versions(spec.versions, versions())
        isa.cap(spec.isa)
        cpu.prepare()
        malloc_tuning.retain_freed_memory()
        torch.set_num_threads(spec.threads)
        take_fp32_kernel(spec.fp32_kernel)
        plan = plans.from_json(spec.plan)
        info = find_base(spec.models_dir, spec.model, spec.digest)
        available = memory(device) // (on_node if device.type == "cpu" else 1)
        check_memory(Catalog(spec.models_dir).config(spec.model), spec, available, share.size)
        backend: Backend
        if spec.shard:
            backend, layers = read_sharded(info, device, spec.weights, plan["bf16"], share.rank, share.size)
            share = draining(share, layers)
        else:
            backend = _read_whole(spec, info, device, plan)
        config, shape = lora_config(plan), backend.decoder.config
        lora = Lora.init(config, shape, seed=0, device=device)
        parent = None if spec.parent is None else Lora.from_state(config, shape, spec.parent, device)
        return cls(backend, plan, share, lora, lora.flatten(), () if parent is None else (Segment(parent),))

    @property
    def gradient_N(self) -> Tensor:
        """That of this worker's share of the last step, flat."""
        assert self.flat_N.grad is not None
        return self.flat_N.grad

    def compute(self, step: Step) -> Accumulated:
        """Compute the gradient of this worker's share. The numbers that are returned are about all rows."""
        torch.manual_seed(dropout_seed(self.plan["seed"], step.number, self.share.rank))
        with torch.no_grad():
            self.flat_N.copy_(torch.tensor(step.weights_N))
            self.gradient_N.zero_()
        if self.plan.objective in ("override", "sft"):
            parts = accumulate_gradients(
                self.backend, self.lora, step.prefix, step.rows, step.mix.kl_weight, self.plan, self.share
            )
        else:
            preferences = Preferences(self.backend, self.plan, self.reference, self.share)
            parts = preferences.accumulate(self.lora, step.rows, step.mix)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                found: Accumulated = end.value
                return found


def _read_whole(spec: RunSpec, info: ModelInfo, device: torch.device, plan: Plan) -> Backend:
    network = read_network(
        info, device, spec.weights, spec.threads, Measurements(spec.models_dir.parent), lambda measure: measure()
    )
    backend = backend_for(network)
    return backend.with_decoder(network.in_bf16() if plan["bf16"] else network.in_fp32())


def draining(share: Share, layers: ShardedLayers) -> Share:
    """A share whose process helps the others to compute theirs before numbers are added up."""

    def add_up(numbers: list[float]) -> list[float]:
        layers.drain()
        return share.add_up(numbers)

    return replace(share, add_up=add_up)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What a worker draws the dropout of a step from: the same when a step is computed again, and after a resume."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def check_versions(head: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises Conflict naming every package whose version differs."""
    differ = [
        f"{name} {here.get(name)} instead of {theirs}" for name, theirs in head.items() if here.get(name) != theirs
    ]
    if differ:
        raise Conflict(
            f"A worker on {platform.node()} has {', '.join(differ)}.",
            param="train",
            hint="Install the same versions of fortwo and torch on the server and on every node of the cluster.",
        )


def find_base(models_dir: Path, model: str, digest: str) -> ModelInfo:
    """The prepared base. Raises Conflict where this process cannot read it, or where it is another one."""
    hint = (
        "Let FORTWO_HOME of the server be a folder on a file system that all nodes of the cluster share under the same "
        "path. A base that was added from a folder or a file needs that path on all nodes, too."
    )
    try:
        info = Catalog(models_dir).model_info(model)
    except (NotFound, OSError):
        info = None
    if info is None:
        raise Conflict(
            f"A worker on {platform.node()} cannot read the base {model!r} in {models_dir}.", param="model", hint=hint
        )
    if info.digest != digest:
        raise Conflict(
            f"A worker on {platform.node()} finds another base {model!r} in {models_dir}: its digest is {info.digest}, "
            f"and the server's is {digest}.",
            param="model",
            hint=hint,
        )
    return info


def check_memory(config: Json, spec: RunSpec, available: int, workers: int = 1) -> None:
    """Raises Unavailable where a worker with so many bytes cannot hold the base, or its part of a sharded one. config:
    the base's config.json."""
    found = fit(config, spec.weights, available)
    if found is None:
        return
    needed, how = found.train, "Every worker holds the whole base"
    hint = "Set FORTWO_SHARD=true, so that each holds a part of it, or FORTWO_WEIGHTS to a smaller format (bf16, nf4)"
    if spec.shard:
        whole = round(PER_PARAMETER[spec.weights] * _in_layers(config, found.parameters))
        needed, how = needed - whole + whole // workers, f"Each of the {workers} workers holds a part of its layers"
        hint = "Give more workers, or set FORTWO_WEIGHTS to bf16"
    if needed > available:
        raise Unavailable(
            f"Training on {spec.model!r} needs {format_size(needed)} of memory in every worker, and a worker on "
            f"{platform.node()} has {format_size(available)}. {how}.",
            param="model",
            hint=f"{hint}, or use nodes with more memory.",
            code="out_of_memory",
        )


def _in_layers(config: Json, parameters: int) -> int:
    """How many of the parameters are those of layers."""
    text = config.get("text_config") or config
    embedding: int = text["hidden_size"] * text["vocab_size"]
    return parameters - embedding * (1 if config.get("tie_word_embeddings", False) else 2)
