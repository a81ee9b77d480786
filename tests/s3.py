"""A local server of S3 (moto) for tests, and what its clients need in the environment."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

START_SECONDS = 120
_buckets = count(1)


class S3:
    """url: of the server; environment: with which its clients find it and may do everything."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.environment = {
            "FSSPEC_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """The URL of a new bucket."""
        import s3fs

        name = f"bucket{next(_buckets)}"
        s3fs.S3FileSystem(skip_instance_cache=True, endpoint_url=self.url).mkdir(name)
        return f"s3://{name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running() -> Iterator[S3]:
    command = Path(sys.executable).with_name("moto_server")
    if not command.exists():
        pytest.skip("moto is not installed: pip install 'fortwo[test]'")
    port = free_port()
    process = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(process, port)
        with pytest.MonkeyPatch.context() as patch:
            server = S3(f"http://127.0.0.1:{port}")
            for name, value in server.environment.items():
                patch.setenv(name, value)
            _read_environment()
            yield server
    finally:
        process.kill()
        process.wait()
        _read_environment()


def _read_environment() -> None:
    """Let fsspec, which reads FSSPEC_* once, see what the environment says now."""
    import fsspec.config

    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "moto_server ended"
        assert time.monotonic() < deadline, "moto_server does not answer"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
