"""Training with workers of a Ray cluster, by Ray Train: the server's side.

The server keeps the run: plan, rows, optimizer, evaluations, checkpoints and events are those of its own process. For
every step it sends the adapter and the rows to the workers, and gets the summed gradient back. A worker that dies loses
nothing therefore: Ray Train starts the group again, and the step is computed again.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from fortwo.errors import InvalidRequest, Unavailable
from fortwo.kernels import isa
from fortwo.quantization.matmul import fp32_kernel
from fortwo.records import Phase, Plan, TrainEvents, Waiting
from fortwo.scale.exchange import News, StepExchange
from fortwo.scale.gradients import RunSpec, Step, versions
from fortwo.scale.ray_cluster import connect
from fortwo.scale.ray_worker import train_loop
from fortwo.scale.sharded import check_shardable
from fortwo.settings import Settings
from fortwo.train import plan as plans
from fortwo.train.losses import Accumulated, Row
from fortwo.train.retry_policy import RowMix

if TYPE_CHECKING:
    from fortwo.engine.registry import LoadedModel
    from fortwo.nn.lora import Lora

RESTARTS = 3  # of the workers of one run
LONGEST = 300  # characters of Ray's own messages that are shown
STORE_BYTES = 1 << 30  # of Ray's object store on this machine, where the server starts Ray


class RayTraining:
    """A connection to a Ray cluster, as jobs.workers.TrainingCluster. Raises Unavailable if the cluster cannot be
    reached."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connected = connect(settings, STORE_BYTES)
        self._taken: Callable[[], Mapping[str, float]] = dict

    def leave_room(self, taken: Callable[[], Mapping[str, float]]) -> None:
        """As in TrainingCluster."""
        self._taken = taken

    def close(self) -> None:
        """Leave the cluster, if this is what joined it; one that was started here ends."""
        if self._connected:
            ray.shutdown()

    def check(self, workers: int) -> None:
        """Raises InvalidRequest if the cluster has too few CPUs for so many workers."""
        needed, there = workers * self._settings.worker_cpus, self._free("CPU")
        if needed > there:
            each = f", {self._settings.worker_cpus} for each (FORTWO_WORKER_CPUS)" if needed > workers else ""
            most = there // self._settings.worker_cpus
            raise InvalidRequest(
                f"workers = {workers} need {needed} CPUs{each}, and the Ray cluster has {self._told(there)}.",
                param="workers",
                hint=f"{f'Give at most {most} workers, or add' if most else 'Add'} nodes to the cluster.",
            )

    def _free(self, resource: str) -> int:
        return max(0, int(_resources().get(resource, 0) - self._taken().get(resource, 0)))

    def _told(self, free: int) -> str:
        return f"{free} beside the replicas" if any(self._taken().values()) else f"{free}"

    def start(
        self,
        base: LoadedModel,
        weights: str,
        plan: Plan,
        workers: int,
        steps_done: int,
        parent: Mapping[str, Tensor] | None,
    ) -> RayWorkers:
        """Start the workers of a run; they load the base while the server prepares the run."""
        settings = self._settings
        self.check(workers)  # again: replicas may have been added since the job was planned
        if settings.shard:
            check_shardable(weights, plan)
        spec = RunSpec(
            model=base.id,
            digest=base.digest,
            models_dir=settings.models_dir.absolute(),
            weights=weights,
            plan=plans.to_json(plan),
            isa=settings.isa,
            threads=settings.worker_cpus,
            fp32_kernel=fp32_kernel(),
            versions=versions(),
            shard=settings.shard,
            parent=parent,
        )
        gpu = base.decoder.device.type == "cuda"
        if gpu and workers > (there := self._free("GPU")):
            raise InvalidRequest(
                f"workers = {workers} need a GPU each, because this server computes on one, and the Ray cluster has "
                f"{self._told(there)}.",
                param="workers",
                hint=f"{f'Give at most {there} workers, add' if there else 'Add'} nodes with GPUs, or set "
                "FORTWO_DEVICE to cpu.",
            )
        return RayWorkers(spec, workers, steps_done, gpu)


class RayWorkers:
    """The workers of one run, as train.workers.GradientWorkers."""

    def __init__(self, spec: RunSpec, workers: int, steps_done: int, gpu: bool) -> None:
        self._workers = workers
        self._number = steps_done  # of the last step
        self._groups = 0  # of workers that have begun
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._exchange = ray.remote(num_cpus=0, scheduling_strategy=here)(StepExchange).remote()
        self._folder = tempfile.mkdtemp(prefix="fortwo-ray-")  # Ray Train wants one, and writes next to nothing
        resources = {"CPU": spec.threads, **({"GPU": 1} if gpu else {})}
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"spec": spec, "exchange": self._exchange},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name="run",
                storage_path=self._folder,
                failure_config=FailureConfig(max_failures=RESTARTS),
                worker_runtime_env={"env_vars": isa.library_caps(spec.isa)},
            ),
        )
        self._ended: Future[None] = Future()
        threading.Thread(target=self._fit, args=(trainer,), name="fortwo-ray-train", daemon=True).start()

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Let the workers end once they have finished the step under way. Their CPUs are free for others then."""
        self._exchange.close.remote()

    def accumulate(self, prefix: int, lora: Lora, rows: list[Row], mix: RowMix) -> TrainEvents[Accumulated]:
        """As GradientWorkers.accumulate. Raises Unavailable when the workers have given up."""
        began = time.perf_counter()
        assert lora.flat_N is not None
        assert lora.flat_N.grad is not None
        self._number += 1
        weights_N = lora.flat_N.detach().cpu().numpy()
        reference = self._call(lambda: ray.put(Step(self._number, prefix, rows, mix, weights_N)))
        self._call(lambda: self._exchange.post.remote(self._number, [reference]))
        while (news := (yield from self._news())).gradient is None:
            yield self._begun(news.groups)
            began = time.perf_counter()
        found = news.gradient.found
        with torch.no_grad():
            lora.flat_N.grad.add_(torch.tensor(news.gradient.gradient_N, device=lora.flat_N.device))
        seconds = time.perf_counter() - began
        return Accumulated(found.loss, found.parts, found.tokens, seconds, found.supervised, found.metrics)

    def _begun(self, groups: int) -> Phase:
        """The event of a group of workers that has begun."""
        first, self._groups = self._groups == 0, groups
        count = f"{self._workers} {'worker' if self._workers == 1 else 'workers'}"
        if first:
            return Phase("running", f"{count} of the Ray cluster compute the gradients.")
        return Phase("running", f"A worker died. {count} began anew, with step {self._number}.")

    def _news(self) -> TrainEvents[News]:
        """What the workers say about the last step. Raises what ended them."""
        reply = self._call(lambda: self._exchange.news.remote(self._number, self._groups))
        while not self._call(lambda: ray.wait([reply], timeout=0)[0]):
            if self._ended.done():
                raise _ended(self._ended.exception())
            yield Waiting()
        news: News = self._call(lambda: ray.get(reply))
        if news.error is not None:
            shown = {name: news.error[name] for name in ("param", "hint", "code")}
            raise Unavailable(news.error["message"], **shown)
        return news

    def _call(self, call: Any) -> Any:
        """The result of a call of Ray. Raises Unavailable for Ray's own errors."""
        try:
            return call()
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise _ended(error) from error


def _ended(error: BaseException | None) -> Unavailable:
    return Unavailable(
        f"The workers of the Ray cluster do not compute any more: {_reason(error)}",
        hint="See the logs of Ray (/tmp/ray/session_latest/logs). Then resume the job: it continues from its last "
        "checkpoint.",
    )


def _reason(error: BaseException | None) -> str:
    """One line about what ended the workers. Of several, one that died is told before those that missed it."""
    if error is None:
        return "they ended before the run did."
    failures = sorted(getattr(error, "worker_failures", {}).items(), key=lambda one: not _died(one[1]))
    rank, cause = failures[0] if failures else (None, error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    line = shorten(lines[0] if _died(cause) else lines[-1], LONGEST)  # the end of a traceback says what happened
    return line if rank is None else f"worker {rank}: {line}"


def _died(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.RayError)


def _resources() -> dict[str, float]:
    try:
        resources: dict[str, float] = ray.cluster_resources()
    except ray.exceptions.RayError as error:
        raise _ended(error) from error
    return resources
