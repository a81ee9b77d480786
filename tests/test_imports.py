"""What must not be loaded by whom, seen where it counts: in sys.modules of a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

TORCH_FREE = (
    "fortwo.cli",
    "fortwo.server.app",
    "fortwo.train.plan",
    "fortwo.train.request",
    "fortwo.jobs.store",
    "fortwo.hub.catalog",
    "fortwo.quantization.selection",
    "fortwo.engine.scheduler",
    "fortwo.data.datasets",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([one for one in ('torch', 'transformers') if one in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fortwo", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.5
