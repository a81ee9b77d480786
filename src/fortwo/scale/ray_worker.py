"""What a worker of Ray Train runs: it asks for steps until the run is over.

Ray Train has connected the workers of a group by torch.distributed (gloo on CPUs, NCCL on GPUs), which sums gradients.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.train.torch import get_device
from torch import Tensor

from fortwo.errors import FortwoError
from fortwo.scale.exchange import Gradient
from fortwo.scale.gradients import GradientWorker, RunSpec
from fortwo.train.shares import Share

NICENESS = 15  # Ray's default: whoever replies to users on the same cores goes first


def train_loop(config: dict[str, Any]) -> None:
    """config: spec (RunSpec) and exchange (the actor). What another attempt would not mend is told to the exchange; any
    other exception lets Ray Train start the group again."""
    if sys.platform != "win32":
        os.nice(max(0, NICENESS - os.nice(0)))
    spec: RunSpec = config["spec"]
    exchange, device = config["exchange"], get_device()
    context = ray.train.get_context()

    def add_up(numbers: list[float]) -> list[float]:
        sums_N = torch.tensor(numbers, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums_N)
        sums: list[float] = sums_N.tolist()
        return sums

    share = Share(context.get_world_rank(), context.get_world_size(), add_up)
    worker = None
    try:
        worker = GradientWorker.of(spec, share, device, context.get_local_world_size())
    except FortwoError as error:
        ray.get(exchange.fail.remote(error.body()["error"]))
    (ready,) = add_up([float(worker is not None)])
    if worker is None or ready < share.size:
        return
    if share.rank == 0:
        ray.get(exchange.begin.remote())
    number = 0
    while (step := ray.get(exchange.next_step.remote(number))) is not None:
        number, (reference,) = step
        found = worker.compute(ray.get(reference))
        torch.distributed.reduce(worker.gradient_N, dst=0)
        if share.rank == 0:
            ray.get(exchange.finish.remote(number, Gradient(_on_cpu(worker.gradient_N).numpy(), found)))


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
