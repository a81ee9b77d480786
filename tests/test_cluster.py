"""A server whose settings name a Ray cluster, where the package ray is missing; and one that uses no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fortwo.errors import InvalidRequest
from fortwo.jobs.workers import planned_workers
from fortwo.settings import Settings


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(home: Path) -> None:
    without_ray = "import sys; sys.modules['ray'] = None; from fortwo.cli import app; app(['serve'])"
    ended = run(without_ray, FORTWO_TRAIN="ray", FORTWO_PORT="0")
    said = " ".join(ended.stderr.split())
    assert ended.returncode != 0
    assert "the package ray is not installed" in said
    assert "pip install 'fortwo[ray]'" in said
    assert "Traceback" not in said


def test_a_server_that_trains_itself_loads_nothing_of_the_cluster(home: Path) -> None:
    code = (
        "import sys; from fortwo.cli.cluster import training_cluster; from fortwo.settings import load\n"
        "with training_cluster(load()) as cluster:\n"
        "    import fortwo.jobs.runner, fortwo.train.loop\n"
        "    assert cluster is None\n"
        "    print([name for name in sys.modules if name.split('.')[0] == 'ray' or name.startswith('fortwo.scale')])"
    )
    ended = run(code)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_several_workers_need_a_cluster_and_one_is_what_there_is() -> None:
    assert planned_workers(None, None) is None
    assert planned_workers(1, None) is None
    with pytest.raises(
        InvalidRequest, match="workers = 2: this server computes the gradients in its own process"
    ) as raised:
        planned_workers(2, None)
    assert raised.value.param == "workers"
    assert "FORTWO_TRAIN=ray" in str(raised.value.hint)


def test_a_sharded_base_needs_a_cluster(home: Path) -> None:
    from fortwo.cli.cluster import training_cluster

    with (
        pytest.raises(InvalidRequest, match="FORTWO_SHARD") as raised,
        training_cluster(Settings(home=home, shard=True)),
    ):
        pass
    assert raised.value.param == "shard"
    assert "FORTWO_TRAIN=ray" in str(raised.value.hint)


def test_several_jobs_at_once_need_a_cluster(home: Path) -> None:
    from fortwo.cli.cluster import training_cluster

    with (
        pytest.raises(InvalidRequest, match="FORTWO_JOBS = 3") as raised,
        training_cluster(Settings(home=home, jobs=3)),
    ):
        pass
    assert raised.value.param == "jobs"
    assert "FORTWO_TRAIN=ray" in str(raised.value.hint)


def test_replicas_compute_replies_themselves(home: Path) -> None:
    from fortwo.cli.engines import check_together

    check_together(Settings(home=home, engine="vllm"))
    check_together(Settings(home=home, replicas=2, train="ray"))
    with pytest.raises(InvalidRequest, match="replicas = 2 cannot have engine = 'vllm'") as raised:
        check_together(Settings(home=home, replicas=2, engine="vllm"))
    assert raised.value.param == "engine"
    assert "FORTWO_ENGINE" in str(raised.value.hint)
