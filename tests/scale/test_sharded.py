"""A base in parts over two workers: the same gradients as with the whole base, and no worker holds it all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from serving import Served, serve, tiny_settings

from fortwo.errors import InvalidRequest, Unavailable
from fortwo.hub.catalog import Catalog
from fortwo.records import Plan, Setting
from fortwo.scale.gradients import RunSpec, check_memory, versions
from fortwo.scale.sharded import check_shardable
from fortwo.server.state import AppState

TOLERANCE = 1e-5

WORKER = """
import sys
from pathlib import Path
import torch
from fortwo.execution.backend import backend_for
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import Plan, Setting
from fortwo.scale.gradients import draining
from fortwo.scale.sharded import read_sharded
from fortwo.train.losses import Row, accumulate_gradients
from fortwo.train.shares import Share

torch.set_num_threads(1)
models, meeting, rank, size, layers_changed = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)

def add_up(numbers):
    sums = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()

info = Catalog(models).model_info("tiny")
backend, layers = read_sharded(info, torch.device("cpu"), "fp32", False, rank, size)
most = 0
real = layers._gather

def gather(index):
    global most
    real(index)
    most = max(most, sum(whole.untyped_storage().nbytes() for whole, _ in layers._parts))

layers._gather = gather
only = {} if layers_changed < 0 else {"layers": (layers_changed,)}
lora = Lora.init(LoraConfig(r=4, alpha=8, **only), backend.decoder.config, seed=1)
torch.manual_seed(0)
for name, tensor in sorted(lora.state().items()):
    tensor.normal_(std=0.05)
flat_N = lora.flatten()
settings = {"micro_step_tokens": 12, "gradient_checkpointing": False}
plan = Plan("tiny", "a", "sft", {}, tuple(Setting(name, value, "user", "") for name, value in settings.items()), {})
lengths = (9, 8, 7, 6, 11)  # three passes for one worker, two for the other
rows = [Row(tuple(range(5, 5 + length)), 3) for length in lengths]
share = draining(Share(rank, size, add_up), layers)
for part in (_ for step in range(2) for _ in accumulate_gradients(backend, lora, 0, rows, 1.0, plan, share)):
    pass
torch.distributed.all_reduce(flat_N.grad)
parts = sum(part.numel() for _, part in layers._parts)
left = sum(whole.untyped_storage().nbytes() for whole, _ in layers._parts)
if rank == 0:
    torch.save({"gradient": flat_N.grad, "parts": parts, "most": most, "left": left}, sys.argv[6])
torch.distributed.barrier()
"""


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    Catalog(folder).add("tiny", tiny)
    Catalog(folder).prepare("tiny")
    return folder


def computed(models: Path, folder: Path, size: int, only: int) -> dict[str, torch.Tensor | int]:
    """What the first of `size` processes has in the end: the gradient of all, and numbers about its memory."""
    meeting, result = folder / f"meeting-{size}-{only}", folder / f"result-{size}-{only}"
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, models, meeting, str(rank), str(size), str(only), result])
        for rank in range(size)
    ]
    assert [one.wait(timeout=300) for one in started] == [0] * size
    found: dict[str, torch.Tensor | int] = torch.load(result)
    return found


@pytest.mark.parametrize("only", [-1, 1])  # 1: the adapter changes the second layer alone
def test_two_workers_with_half_of_each_layer_compute_the_gradient(models: Path, tmp_path: Path, only: int) -> None:
    one, two = (computed(models, tmp_path, size, only) for size in (1, 2))
    assert isinstance(one["gradient"], torch.Tensor)
    assert isinstance(two["gradient"], torch.Tensor)
    size = float(one["gradient"].norm())
    assert size > 0
    assert float((one["gradient"] - two["gradient"]).norm()) < TOLERANCE * size
    assert two["parts"] * 2 == one["parts"]
    assert two["most"] == one["most"] == one["parts"] * 4 // 2  # bytes of one layer of two
    assert two["left"] == 0


def test_a_job_on_a_sharded_base_makes_the_adapter_of_one_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed here: make test-scale installs it and runs these tests")
    from fortwo.scale.ray_train import RayTraining
    from tests.scale.test_ray_train import REQUESTS, adapter, distance, start

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets must be short
    monkeypatch.setenv("RAY_TMPDIR", folder)
    settings = tiny_settings(tmp_path / "ray", tiny, train="ray", shard=True, weights="fp32")
    cluster = RayTraining(settings)

    def finished(served: Served, name: str) -> dict[str, torch.Tensor]:
        return adapter(served, served.wait(start(served, name, **REQUESTS[name]), seconds=200))

    try:
        with (
            serve(settings, create=partial(AppState, cluster=cluster)) as sharded,
            serve(tiny_settings(tmp_path / "own", tiny, weights="fp32")) as own,
        ):
            for name in ("override", "kto"):
                assert distance(finished(sharded, name), finished(own, name)) < TOLERANCE
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def plan_with(**lora: object) -> Plan:
    return Plan("tiny", "a", "sft", {}, tuple(Setting(name, value, "user", "") for name, value in lora.items()), {})


def test_formats_that_cannot_be_sharded_are_named() -> None:
    with pytest.raises(InvalidRequest, match="held in nf4") as refused:
        check_shardable("nf4", plan_with())
    assert refused.value.param == "shard"
    assert "bf16" in str(refused.value.hint)


def test_a_part_of_a_base_needs_less_memory(models: Path) -> None:
    """Llama 7B in bf16: more than 15 GiB whole, less with four workers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    }
    given = {"model": "7b", "digest": "", "models_dir": models, "weights": "bf16", "plan": {}, "isa": "auto"}
    more = {"threads": 1, "fp32_kernel": "torch", "versions": versions()}
    whole, part = (RunSpec(**given, **more, shard=shard) for shard in (False, True))  # type: ignore[arg-type]
    available = 15 << 30
    with pytest.raises(Unavailable, match="holds the whole base") as refused:
        check_memory(config, whole, available, 4)
    assert "FORTWO_SHARD" in str(refused.value.hint)
    check_memory(config, part, available, 4)
    with pytest.raises(Unavailable, match="Each of the 2 workers holds a part") as refused:
        check_memory(config, part, 9 << 30, 2)
    assert "more workers" in str(refused.value.hint)
