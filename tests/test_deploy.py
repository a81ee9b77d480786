"""The files in deploy/ agree with the server's settings, and the steps of the image for CPUs work: its wheel is built
and installed, and its entrypoint serves, as far as a machine without a container engine can show it."""

from __future__ import annotations

import configparser
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
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from fortwo.hub.catalog import Catalog
from fortwo.jobs import runner
from fortwo.kernels import build, isa
from fortwo.server import health, security, uvicorn_server
from fortwo.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
VOLUME = "/var/lib/fortwo"
# Replies, then the job's step, then the last bytes of connections.
DRAIN_SECONDS = uvicorn_server.GRACE_SECONDS + runner.CLOSE_SECONDS + uvicorn_server.CLOSE_SECONDS
FOLDERS_OF_DATA = "FORTWO_DATA_DIRS"


@dataclass(frozen=True)
class Stage:
    """A stage of a Dockerfile. steps: (instruction, the rest of it), flags of RUN and COPY left out."""

    base: str
    steps: list[tuple[str, str]]

    def values(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    @property
    def env(self) -> dict[str, str]:
        words = [word for rest in self.values("ENV") for word in shlex.split(rest)]
        arguments = [rest for rest in self.values("ARG") if "=" in rest]
        return dict(word.split("=", 1) for word in [*arguments, *words])


def stages(dockerfile: Path) -> list[Stage]:
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            found.append(Stage(rest.split()[0], []))
        else:
            found[-1].steps.append((name, re.sub(r"^(--\S+\s+)+", "", rest) if name in ("RUN", "COPY") else rest))
    return found


def healthcheck(stage: Stage) -> list[str]:
    (check,) = stage.values("HEALTHCHECK")
    words: list[str] = json.loads(check[check.index("[") :])
    return words


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# ------------------------------------------------------------ what the files say


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_pinned_has_no_secret_and_runs_as_a_user_without_rights(dockerfile: Path) -> None:
    made = stages(dockerfile)
    for stage in made:
        assert re.search(r":\d+\.\d+\.\d+-", stage.base), f"{stage.base} has no exact version"
        assert not [name for name in stage.env if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]
        for run in stage.values("RUN"):
            assert "pip install" not in run or "constraints.txt" in run
    last = made[-1]
    (user,) = last.values("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "Kubernetes compares numbers with runAsNonRoot"
    assert f"--uid {user.split(':')[0]} " in " ".join(last.values("RUN"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_agrees_with_the_settings(dockerfile: Path) -> None:
    last = stages(dockerfile)[-1]
    named = {name for name in last.env if name.startswith("FORTWO_")}
    assert named <= {f"FORTWO_{name.upper()}" for name in Settings.model_fields}
    assert last.env["FORTWO_PORT"] == str(Settings.model_fields["port"].default) == last.values("EXPOSE")[0]
    assert not security.is_loopback(last.env["FORTWO_HOST"])
    assert last.values("VOLUME") == [VOLUME]
    for name in ("FORTWO_HOME", "XDG_CACHE_HOME"):
        assert last.env[name].startswith(f"{VOLUME}/"), "everything that is written lies on the volume"
    assert last.env[FOLDERS_OF_DATA] == "[]", "the working directory holds the home"
    assert last.values("STOPSIGNAL") == ["SIGTERM"]
    assert "/healthz" in healthcheck(last)[-1]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_copies_is_sent_to_the_builder(dockerfile: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    for stage in stages(dockerfile):
        for copy in stage.values("COPY"):
            for source in copy.split()[:-1]:
                assert (ROOT / source).exists()
                assert source in sent


def test_both_images_build_the_wheel_alike_with_the_packages_of_its_extra() -> None:
    first, other = (stages(dockerfile)[0] for dockerfile in DOCKERFILES)
    assert first == other
    extra = {Requirement(one).name for one in PROJECT["optional-dependencies"]["wheel"]}
    installed = next(run for run in first.values("RUN") if "pip install" in run)
    assert extra <= set(installed.split())


def test_compose_demands_a_key_and_lets_nothing_be_written_but_the_volume() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["fortwo"]
    assert service["environment"]["FORTWO_API_KEY"].startswith("${FORTWO_API_KEY:?")
    assert service["image"] == f"fortwo:{VERSION}"
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILES[0])
    assert service["volumes"] == [f"home:{VOLUME}"]
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    port = stages(DOCKERFILES[0])[-1].env["FORTWO_PORT"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert seconds(service["stop_grace_period"]) > DRAIN_SECONDS


def test_compose_for_gpus_changes_the_same_service() -> None:
    (name, service), *others = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())["services"].items()
    assert (name, others) == ("fortwo", [])
    assert service["image"] == f"fortwo:{VERSION}-cuda"
    assert (ROOT / service["build"]["dockerfile"]).samefile(DOCKERFILES[1])


def kubernetes() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_kubernetes_asks_the_paths_that_need_no_key_and_waits_for_the_drain() -> None:
    pod = kubernetes()["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in security.OPEN_PATHS
        assert probe["httpGet"]["port"] == container["ports"][0]["name"]
    assert probes["readiness"]["httpGet"]["path"] == "/readyz"
    assert probes["readiness"]["periodSeconds"] > probes["readiness"]["timeoutSeconds"] > health.READY_SECONDS
    assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS


def test_kubernetes_gives_the_image_its_user_its_volume_its_port_and_a_secret_from_elsewhere() -> None:
    objects, image = kubernetes(), stages(DOCKERFILES[0])[-1]
    assert "Secret" not in objects
    stateful = objects["StatefulSet"]["spec"]
    pod = stateful["template"]["spec"]
    (container,) = pod["containers"]
    user = pod["securityContext"]
    assert image.values("USER") == [f"{user['runAsUser']}:{user['runAsGroup']}"]
    assert user["fsGroup"] == user["runAsGroup"]
    assert user["runAsNonRoot"]
    assert container["image"] == f"fortwo:{VERSION}"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {one["mountPath"] for one in container["volumeMounts"]} == {VOLUME, "/tmp"}
    assert stateful["replicas"] == 1, "a home belongs to one server"
    (key,) = container["env"]
    assert key["name"] == "FORTWO_API_KEY"
    assert "secretKeyRef" in key["valueFrom"]
    assert {*container["resources"]} == {"requests", "limits"}
    (port,) = objects["Service"]["spec"]["ports"]
    assert str(port["port"]) == str(container["ports"][0]["containerPort"]) == image.env["FORTWO_PORT"]
    assert objects["Service"]["spec"]["selector"] == stateful["template"]["metadata"]["labels"]


def test_kubernetes_does_not_set_the_port_to_the_address_of_the_service() -> None:
    objects = kubernetes()
    variable = f"{objects['Service']['metadata']['name'].upper()}_PORT"
    assert variable == "FORTWO_PORT", "Kubernetes calls the address of a service so"
    assert objects["StatefulSet"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "fortwo.service")
    return parser


def test_the_unit_keeps_the_home_out_of_the_folders_of_datasets_and_waits_for_the_drain() -> None:
    service = unit()["Service"]
    env = dict(word.split("=", 1) for word in shlex.split(service["Environment"]))
    state = f"/var/lib/{service['StateDirectory']}"
    assert env["FORTWO_HOME"].startswith(f"{state}/")
    assert env["XDG_CACHE_HOME"].startswith(f"{state}/")
    assert env[FOLDERS_OF_DATA] == "[]"
    assert seconds(service["TimeoutStopSec"]) > DRAIN_SECONDS
    assert int(service["LimitNOFILE"]) > Settings.model_fields["max_connections"].default
    assert service["User"] not in ("", "root")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    text = (DEPLOY / "fortwo.service").read_text()
    copy = tmp_path / "fortwo.service"
    copy.write_text(text.replace("/opt/fortwo/bin/fortwo", "/bin/true").replace("=fortwo\n", "=root\n"))
    for check in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(["systemd-analyze", *check, str(copy)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert copy.name not in done.stderr


# ------------------------------------------------------------ the steps of the image, executed


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
        grace = kubernetes()["StatefulSet"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
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
