"""The one reader of the environment: defaults < FORTWO_HOME/settings.toml < FORTWO_* < what a caller passes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from fortwo.errors import InvalidRequest


def _home() -> Path:
    return Path(os.environ.get("FORTWO_HOME", "~/.fortwo")).expanduser()


class Settings(BaseSettings):
    """Frozen after construction; unknown keys in the file are refused."""

    model_config = SettingsConfigDict(env_prefix="FORTWO_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=_home, description="Where models, adapters and the database live.")
    host: str = Field("127.0.0.1", description="Address to listen on; anything beyond loopback needs an api_key.")
    port: int = Field(5001, ge=0, le=65535, description="Port to listen on.")
    api_key: SecretStr | None = Field(
        None, description="When set, all but `/healthz`, `/` and `/docs` needs `Authorization: Bearer <key>`."
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL; default is SQLite under home.")
    data_dirs: tuple[Path, ...] = Field(
        default_factory=lambda: (Path.cwd(),), description="Folders that dataset paths may name, besides home/data."
    )
    default_model: str = Field("smollm2-135m-instruct", description="Base model used when a request names none.")
    weights: Literal["auto", "fp32", "bf16", "int8", "int4", "nf4"] = Field(
        "auto",
        description="How base weights are held and multiplied to serve; auto measures which form is fastest for how "
        "many rows, among those that hardly change what is said.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    isa: Literal["auto", "amx", "avx512", "avx2", "none"] = Field(
        "auto",
        description="The highest level of instructions that fortwo's kernels and the libraries use on an x86 "
        "processor. auto is the highest that the processor has; none is torch's own operations, without kernels.",
    )
    cache_mb: int | None = Field(
        None, ge=1, description="MiB for keys and values, for each base; default: an eighth of the device's memory."
    )
    max_adapters: int = Field(64, ge=1, description="Adapters in memory at once; the least recently used gives way.")
    queue: int = Field(
        256, ge=0, description="Replies that may wait for their turn; past it, a request is refused with status 429."
    )
    request_timeout: float = Field(
        600.0, gt=0, description="Seconds that a reply may take, waiting for its turn included; then it is ended."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the device owner; default: all cores.")
    resume: bool = Field(
        False,
        description="Whether the start of a server goes on with jobs that ran when the last one ended. Off, because a "
        "job that brought a server down (for want of memory, say) would do so at every start.",
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
        file = TomlConfigSettingsSource(settings_cls, _home() / "settings.toml")
        return init_settings, env_settings, file

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
    def allowed_data_dirs(self) -> tuple[Path, ...]:
        return (self.home / "data", *self.data_dirs)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'fortwo.db'}"


def load(**flags: Any) -> Settings:
    """Settings with `flags` (None means not given) on top.

    Raises InvalidRequest naming the setting, its value and the remedy.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"setting {name} = {first.get('input')!r}: {first['msg']}",
            param=name,
            hint=f"Change FORTWO_{name.upper()}, the flag or {_home() / 'settings.toml'}.",
        ) from None
