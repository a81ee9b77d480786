"""The files in deploy/ agree with the server's settings."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment import (
    DEPLOY,
    DOCKERFILES,
    DRAIN_SECONDS,
    PROJECT,
    ROOT,
    VERSION,
    VOLUME,
    healthcheck,
    objects,
    stages,
)
from packaging.requirements import Requirement

from fortwo.server import health, security
from fortwo.settings import Settings

FOLDERS_OF_DATA = "FORTWO_DATA_DIRS"


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


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


def test_kubernetes_asks_the_paths_that_need_no_key_and_waits_for_the_drain() -> None:
    pod = objects("kubernetes.yaml")["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in security.OPEN_PATHS
        assert probe["httpGet"]["port"] == container["ports"][0]["name"]
    assert probes["readiness"]["httpGet"]["path"] == "/readyz"
    assert probes["readiness"]["periodSeconds"] > probes["readiness"]["timeoutSeconds"] > health.READY_SECONDS
    assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS


def test_kubernetes_gives_the_image_its_user_its_volume_its_port_and_a_secret_from_elsewhere() -> None:
    made, image = objects("kubernetes.yaml"), stages(DOCKERFILES[0])[-1]
    assert "Secret" not in made
    stateful = made["StatefulSet"]["spec"]
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
    (port,) = made["Service"]["spec"]["ports"]
    assert str(port["port"]) == str(container["ports"][0]["containerPort"]) == image.env["FORTWO_PORT"]
    assert made["Service"]["spec"]["selector"] == stateful["template"]["metadata"]["labels"]


def test_kubernetes_does_not_set_the_port_to_the_address_of_the_service() -> None:
    made = objects("kubernetes.yaml")
    variable = f"{made['Service']['metadata']['name'].upper()}_PORT"
    assert variable == "FORTWO_PORT", "Kubernetes calls the address of a service so"
    assert made["StatefulSet"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def ray_pods() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of the head and that of a replica."""
    cluster = objects("kuberay.yaml")["RayCluster"]["spec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]


def test_kuberay_gives_each_replica_its_pod_and_the_head_none() -> None:
    cluster = objects("kuberay.yaml")["RayCluster"]["spec"]
    (workers,) = cluster["workerGroupSpecs"]
    (head,), (replica,) = (pod["containers"] for pod in ray_pods())
    env = {one["name"]: one.get("value") for one in head["env"]}
    assert set(env) <= {f"FORTWO_{name.upper()}" for name in Settings.model_fields}
    assert int(env["FORTWO_REPLICAS"]) == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    assert env["FORTWO_THREADS"] == replica["resources"]["requests"]["cpu"] == replica["resources"]["limits"]["cpu"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert env["FORTWO_RAY_ADDRESS"] == "auto"


def test_kuberay_runs_the_tested_ray_with_a_token() -> None:
    made = objects("kuberay.yaml")
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={made['RayCluster']['spec']['rayVersion']}" in constraints
    assert made["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}, "whoever reaches Ray's port runs code"
    assert "Secret" not in made
    for pod in ray_pods():
        (container,) = pod["containers"]
        assert container["image"] == f"fortwo:{VERSION}-ray"
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
    assert made["RayCluster"]["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}


def test_kuberay_lets_the_head_alone_write_to_the_home_that_all_pods_see() -> None:
    made, image = objects("kuberay.yaml"), stages(DOCKERFILES[0])[-1]
    claim = made["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = []
    for pod in ray_pods():
        assert image.values("USER") == [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounts.append({one["mountPath"]: one.get("readOnly", False) for one in container["volumeMounts"]})
    assert mounts == [{VOLUME: False, "/tmp": False}, {VOLUME: True, "/tmp": False}]


def test_kuberay_waits_for_the_replicas_at_the_start_and_for_the_drain_at_the_end() -> None:
    pod, _ = ray_pods()
    (head,) = pod["containers"]
    source = (ROOT / "src" / "fortwo" / "scale" / "ray_serve.py").read_text()  # it needs Ray, which is not here
    limit = int(re.findall(r"^START_SECONDS = (\d+)", source, re.MULTILINE)[0])
    assert head["startupProbe"]["periodSeconds"] * head["startupProbe"]["failureThreshold"] > limit
    for name in ("startup", "liveness", "readiness"):
        assert head[f"{name}Probe"]["httpGet"]["path"] in security.OPEN_PATHS
    assert head["readinessProbe"]["timeoutSeconds"] > health.READY_SECONDS
    assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS


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
