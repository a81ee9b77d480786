"""All settings; no other module reads FORTWO_* variables. In rising precedence: defaults, FORTWO_HOME/settings.toml,
FORTWO_* variables, flags of the command line."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fortwo.errors import InvalidRequest


def _home() -> Path:
    return Path(os.environ.get("FORTWO_HOME", "~/.fortwo")).expanduser()


def _file() -> Path:
    return _home() / "settings.toml"


class Settings(BaseSettings):
    """Immutable. Raises pydantic's ValidationError for wrong values and for unknown keys in settings.toml, and other
    errors for what cannot be read; `load` raises InvalidRequest for all of them."""

    model_config = SettingsConfigDict(env_prefix="FORTWO_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=_home, description="Folder of models, adapters and the database.")
    host: str = Field("127.0.0.1", description="Address to listen on; any but a loopback one needs an API key.")
    port: int = Field(5001, ge=0, le=65535, description="Port to listen on.")
    api_key: SecretStr | None = Field(
        None,
        description="If set, all paths but `/healthz`, `/` and `/docs` need `Authorization: Bearer <key>`, with this "
        "key, which may do everything, or with one of `fortwo keys create`.",
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL of the database; default: SQLite under home.")
    adapters_url: str | None = Field(
        None,
        description="URL of fsspec under which all versions of adapters are kept for several servers, such as "
        "s3://bucket/folder (needs `fortwo[s3]`); the home is a cache of it (docs/guide-scale.md). Default: they are "
        "in the home alone.",
    )
    data_dirs: tuple[Path, ...] = Field(
        default_factory=lambda: (Path.cwd(),), description="Folders in which dataset paths may lie, besides home/data."
    )
    default_model: str = Field("smollm2-135m-instruct", description="Base model of a request that names none.")
    weights: Literal["auto", "fp32", "bf16", "int8", "gguf", "int4", "nf4"] = Field(
        "auto",
        description="Format in which base weights are held and multiplied for serving. gguf is the "
        "numbers of a quantised GGUF file. auto is gguf for such a file; for others it measures which format is "
        "fastest for each number of rows, among those that hardly change the replies.",
    )
    device: str = Field(
        "auto",
        description="Device to compute on: auto, cpu, cuda or cuda:N, or several GPUs, such as cuda:0,cuda:1, among "
        "which replies are divided (docs/guide-gpu.md).",
    )
    train_device: str | None = Field(
        None,
        description="Device on which jobs compute, such as cuda:1, so that replies have FORTWO_DEVICE to themselves "
        "(docs/guide-gpu.md). Default: both take turns on FORTWO_DEVICE, on the first of several.",
    )
    engine: Literal["own", "vllm"] = Field(
        "own",
        description="Who computes the replies: fortwo itself, or a vLLM server. Training is fortwo's in both cases.",
    )
    vllm_url: str | None = Field(
        None,
        description="With FORTWO_ENGINE=vllm: the running vLLM, such as http://127.0.0.1:8000. Default: fortwo starts "
        "one on this machine for the default model, and ends it.",
    )
    vllm_api_key: SecretStr | None = Field(None, description="The key of vLLM's --api-key, if it has one.")
    vllm_command: str = Field(
        "vllm serve",
        description="With FORTWO_ENGINE=vllm and no FORTWO_VLLM_URL: the command that starts vLLM, with any options of "
        "vLLM. fortwo adds the model, the address and what its adapters need.",
    )
    isa: Literal["auto", "amx", "avx512", "avx2", "dotprod", "neon", "none"] = Field(
        "auto",
        description="The highest instruction set that fortwo's kernels and the libraries use: amx, avx512 or avx2 on "
        "an x86 processor, dotprod or neon on an ARM processor. auto is the highest that the processor has; none uses "
        "torch's operations instead of the kernels.",
    )
    cache_mb: int | None = Field(
        None, ge=1, description="MiB for keys and values of each base; default: an eighth of the device's memory."
    )
    max_adapters: int = Field(64, ge=1, description="Limit of adapters in memory; the least recently used is unloaded.")
    queue: int = Field(
        256, ge=0, description="Replies that may wait for their turn; beyond it a request is refused with status 429."
    )
    request_timeout: float = Field(
        600.0, gt=0, description="Seconds that a reply may take, including its wait; then it ends with an error."
    )
    max_body_mb: int = Field(16, ge=1, description="MiB that the body of a request may have; beyond it: status 413.")
    max_upload_mb: int = Field(512, ge=1, description="The same for an uploaded file.")
    max_connections: int = Field(
        1000, ge=1, description="Connections at the same time; beyond it a new one is answered with status 503."
    )
    max_streams: int = Field(
        256, ge=1, description="Event streams of jobs and exports at the same time; beyond it: status 429."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads that compute; default: all cores.")
    train: Literal["own", "ray"] = Field(
        "own",
        description="Where the gradients of jobs are computed: own is the server's process, ray is workers of a Ray "
        "cluster, which needs the package `fortwo[ray]`.",
    )
    ray_address: str | None = Field(
        None,
        description="Address of the Ray cluster that this machine has joined, as HOST:PORT, or auto; default: Ray is "
        "started on this machine when it is needed.",
    )
    worker_cpus: int = Field(
        1, ge=1, description="CPUs of the Ray cluster that a training worker takes, and threads that it computes with."
    )
    shard: bool = Field(
        False,
        description="With FORTWO_TRAIN=ray: whether each worker of a run holds only its part of the base's layers, for "
        "a base that does not fit one worker (docs/guide-scale.md).",
    )
    jobs: int = Field(
        1, ge=1, le=64, description="Jobs that run at once, if the workers of a Ray cluster compute their gradients."
    )
    replicas: int | None = Field(
        None,
        ge=1,
        description="Engines that answer requests, each in a process of its own (docs/guide-scale.md); needs the "
        "package ray. Default: the server's own engine answers them.",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="What the server's log on standard error consists of: lines of text, or a JSON object a line.",
    )
    resume: bool = Field(
        False,
        description="Whether a starting server resumes the jobs that ran when the last one ended. Off by default: a "
        "job that made a server crash (by using up the memory, for example) would do so at every start.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = TomlConfigSettingsSource(settings_cls, _file())
        return init_settings, env_settings, file

    @property
    def plain_api_key(self) -> str | None:
        """api_key as it is sent."""
        return None if self.api_key is None else self.api_key.get_secret_value()

    @property
    def plain_vllm_api_key(self) -> str | None:
        """vllm_api_key as it is sent."""
        return None if self.vllm_api_key is None else self.vllm_api_key.get_secret_value()

    @property
    def vllm_dir(self) -> Path:
        return self.home / "vllm"

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def adapters_dir(self) -> Path:
        return self.home / "adapters"

    @property
    def jobs_dir(self) -> Path:
        return self.home / "jobs"

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def hub_datasets_dir(self) -> Path:
        return self.home.absolute() / "data" / ".hub"

    @property
    def allowed_data_dirs(self) -> tuple[Path, ...]:
        return (self.home / "data", *self.data_dirs)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'fortwo.db'}"


def load(**flags: Any) -> Settings:
    """The settings, with `flags` in place of those of their names; None means not given. Raises InvalidRequest naming
    the setting, its value and the remedy."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(
            f"{_file()} is not TOML: {error}.", param="settings.toml", hint="Correct the file, or move it away."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(
            f"{_file()} cannot be read: {reason}.",
            param="settings.toml",
            hint="Make it a UTF-8 file that this user can read, or move it away.",
        ) from None
    except SettingsError as error:  # a value of FORTWO_* that must be JSON is not
        found = re.search(r'field "(\w+)"', str(error))
        name = found[1] if found else ""
        variable = f"FORTWO_{name.upper()}"
        raise InvalidRequest(
            f"{variable} = {os.environ.get(variable)!r} is not JSON.",
            param=name or None,
            hint=f"""Write a list, for example {variable}='["/folder", "/other folder"]'.""",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"Setting {name} = {first.get('input')!r} is not valid: {first['msg']}.",
            param=name,
            hint=f"Change FORTWO_{name.upper()}, the flag, or the line in {_file()}.",
        ) from None
