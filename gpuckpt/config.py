"""The configuration: what can be set, and where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Paths(_Table):
    """Where things are kept on the host."""

    prefix: Path = Field(Path("/opt/gpuckpt"), description="what `make setup` installs: CRIU, environments")
    state: Path = Field(Path("/var/lib/gpuckpt"), description="replicas' writable layers, logs of operations")
    run: Path = Field(Path("/run/gpuckpt"), description="locks, sockets; gone after a reboot")
    hooks: Path = Field(Path("/etc/gpuckpt/hooks.d"), description="your executables, run at CRIU's stages")


class Store(_Table):
    """Where goldens lie."""

    path: Path = Field(Path("/run/gpuckpt/store"), description="a tmpfs, mounted here when it is not one yet")
    size: Bytes | None = Field(None, description="limit of that tmpfs in bytes; default: 80 % of the memory")
    huge: Literal["never", "always", "within_size", "advise"] = Field(
        "within_size", description="huge pages of that tmpfs (tmpfs(5))"
    )


class Criu(_Table):
    """How CRIU is run."""

    path: Path | None = Field(None, description="the criu program; default: the one `make setup` chose, else PATH")
    log_level: int = Field(2, ge=0, le=4, description="CRIU's -v: 2 warnings, 4 everything (slow)")
    ghost_limit: Bytes = Field(1 << 30, description="largest deleted file that is carried in the images, in bytes")


class Podman(_Table):
    """How containers are run."""

    runtime: Literal["auto", "runc", "crun"] = Field("auto", description="the OCI runtime; auto: one that can checkpoint")
    timeout: Seconds = Field(600, description="longest single podman operation, in seconds")


class Create(_Table):
    """Defaults of `gpuckpt create`."""

    name: str | None = Field(None, description="the golden's name when none is given (CONT_NAME)")
    model: str | None = Field(None, description="the model served: a folder or a hub id (MODEL_ID)")
    image: str | None = Field(None, description="container image; default: the host's own root file system")
    publish: str | None = Field(None, description="[HOST_IP:]HOST_PORT[:PORT] to publish on a bridge network (API_PORT)")
    start_timeout: Seconds = Field(600, description="longest wait for the server's health, in seconds")
    warmup: int = Field(3, ge=0, description="number of warm-up requests")
    prompts: tuple[str, ...] = Field(
        ("The capital of France is", "Once upon a time, in a land far away,"), description="prompts of the warm-up"
    )


class Settings(_Table):
    """Every setting; immutable once loaded."""

    paths: Paths = Paths()
    store: Store = Store()
    criu: Criu = Criu()
    podman: Podman = Podman()
    create: Create = Create()
