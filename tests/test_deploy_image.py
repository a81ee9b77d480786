"""The steps of the image for CPUs work: its wheel is built and installed, and its entrypoint serves, as far as a
machine without a container engine can show it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from deployment import DOCKERFILES, ROOT, VOLUME, Stage, healthcheck, objects, stages

from fortwo.hub.catalog import Catalog
from fortwo.kernels import build, isa


@dataclass(frozen=True)
class Image:
    """root: stands for / of the container; its volume is `volume`. bin: what is first in its PATH."""

    root: Path
    stage: Stage

    @property
    def volume(self) -> Path:
        return self.root / VOLUME.removeprefix("/")

    @property
    def bin(self) -> Path:
        return self.root / "venv" / "bin"

    def environment(self, **more: str) -> dict[str, str]:
        """What the container's process sees."""
        made = {name: value.replace(VOLUME, str(self.volume)) for name, value in self.stage.env.items()}
        path = os.pathsep.join((str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]))
        return {**clean(), "HOME": str(self.volume), "PATH": path, **made, **more}

    def run(self, command: str, cwd: Path, **more: str) -> None:
        """Execute a step of a Dockerfile. Raises AssertionError with its output if it fails."""
        for folder in ("/wheels", "/constraints.txt"):
            command = re.sub(rf"(?<!\w){folder}", f"{self.root}{folder}", command)
        done = subprocess.run(
            ["sh", "-euc", command], cwd=cwd, env=self.environment(**more), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def files(self) -> set[Path]:
        return {path for path in (self.root / "venv").rglob("*") if path.is_file()}


def clean() -> dict[str, str]:
    """The environment without what would change fortwo or Python, but for the level of instructions."""
    mine = ("FORTWO_", "PYTHON", "XDG_", "VIRTUAL_ENV", "CC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    return kept | {name: value for name, value in os.environ.items() if name == "FORTWO_ISA"}


def environment_beside(folder: Path) -> None:
    """A virtual environment that sees every package of this one but fortwo, so that pip finds them installed."""
    venv.create(folder, with_pip=False)
    packages = folder / "others"
    packages.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.lower().startswith(("fortwo", "_editable", "__editable")) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    major, minor = sys.version_info[:2]
    (folder / "lib" / f"python{major}.{minor}" / "site-packages" / "others.pth").write_text(str(packages))


def quick_compiler(folder: Path) -> Path:
    """A C compiler that compiles for this processor's level without optimising, and nothing for the other levels."""
    own = [one.flags for one in build.SHIPPED if one.level == isa.level() and one.needs <= isa.flags()]
    wanted = f"*{shlex.quote(' '.join(own[0]))}*" if own else "none"
    script = folder / "quick-cc"
    script.write_text(
        f"""#!/bin/sh
case "$*" in
    {wanted} | *-shared*) exec cc "$@" -O0 ;;
esac
while [ "$1" != -o ]; do shift; done
exec cc -x c -c /dev/null -o "$2"
"""
    )
    script.chmod(0o755)
    return script


def execute(image: Image, stage: Stage, cwd: Path, **more: str) -> None:
    """Carry out COPY and RUN. Left out: the step that adds a user to the machine."""
    for name, rest in stage.steps:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = cwd / target
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__", "compiled")
                    shutil.copytree(ROOT / source, place, ignore=ignore, dirs_exist_ok=True)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif name == "RUN" and not rest.startswith("useradd"):
            image.run(rest, cwd, **more)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    root = tmp_path_factory.mktemp("image")
    wheel, last = stages(DOCKERFILES[0])
    made = Image(root, last)
    environment_beside(root / "venv")
    (source := root / "source").mkdir()
    made.volume.mkdir(parents=True)
    execute(made, wheel, source, CC=str(quick_compiler(root)))
    shutil.copy(ROOT / "constraints.txt", root)
    execute(made, last, made.volume)
    return made


@contextmanager
def started(image: Image, **more: str) -> Iterator[subprocess.Popen[str]]:
    """The container's process: ENTRYPOINT and CMD in its WORKDIR."""
    words = [word for name in ("ENTRYPOINT", "CMD") for word in json.loads(image.stage.values(name)[0])]
    process = subprocess.Popen(
        [str(image.bin / words[0]), *words[1:]],
        cwd=image.volume,
        env=image.environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_well(image: Image, port: str) -> bool:
    """Whether the image's HEALTHCHECK is content."""
    name, *rest = healthcheck(image.stage)
    command = [str(image.bin / name), *rest]
    return subprocess.run(command, env=image.environment(FORTWO_PORT=port), capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_image_refuses_to_start_without_a_key(image: Image) -> None:
    with started(image) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "there is no API key" in said
    assert "FORTWO_API_KEY" in said


@pytest.mark.slow
def test_the_image_serves_with_a_key_writes_only_to_its_volume_and_ends_in_time(image: Image, tiny: Path) -> None:
    Catalog(image.volume / "home" / "models").add("tiny", tiny)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    before = image.files()
    assert not is_well(image, port)
    with started(image, FORTWO_API_KEY="secret", FORTWO_PORT=port, FORTWO_DEFAULT_MODEL="tiny") as process:
        wait_for(process, port)
        assert is_well(image, port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            assert client.get("/readyz").json()["status"] == "ok"
            body = {"messages": [{"role": "user", "content": "hello"}], "model": "tiny", "max_tokens": 4}
            assert client.post("/v1/chat/completions", json=body).status_code == 401
            key = {"Authorization": "Bearer secret"}
            answer = client.post("/v1/chat/completions", json=body, headers=key)
            assert answer.json()["usage"]["completion_tokens"] > 0
            database = {"dataset": {"path": str(image.volume / "home" / "fortwo.db")}, "adapter_name": "a"}
            refused = client.post("/api/training/plan", json=database, headers=key)
            assert refused.status_code == 400
            assert "may lie" in refused.text or "allowed" in refused.text
        process.send_signal(signal.SIGTERM)
        grace = objects("kubernetes.yaml")["StatefulSet"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        said, _ = process.communicate(timeout=grace)
    assert process.returncode in (0, -signal.SIGTERM), said
    assert image.files() == before, "the image's own files are read-only"
    assert not (image.volume / "cache" / "fortwo").exists(), "the wheel brings the kernels"


def wait_for(process: subprocess.Popen[str], port: str) -> None:
    """Wait until the server listens."""
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise AssertionError(f"the server ended: {process.communicate()[0]}")
