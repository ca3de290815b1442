"""Containers as gpuckpt sees them: create, start, checkpoint, restore, look, remove."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from gpuckpt import proc
from gpuckpt.containers import freezer, leftovers, logs
from gpuckpt.containers.api import Api
from gpuckpt.errors import BusyError, DeadlineError, GpuckptError, NotFoundError, PreflightError, UsageError
from gpuckpt.manifest import Launch

LABEL = "gpuckpt.replica"
OWNER = "gpuckpt.state"  # the state folder of the gpuckpt that a container belongs to: a machine may have several
PREFIX = "gpuckpt-"
ALIVE = ("running", "paused")  # states in which a container has processes


class ContainerSpec(Struct, frozen=True):
    """What a container is made of; ``rootfs`` is a mounted folder, ``binds`` are (source, destination, read-only).

    ``devices`` are files, or names by CDI.
    """

    name: str
    replica: str
    golden: str
    rootfs: Path
    launch: Launch
    binds: tuple[tuple[str, str, bool], ...]
    criu_config: Path
    seccomp: Path
    hostname: str
    ip: str | None = None
    mac: str | None = None
    devices: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


class Container(Struct, frozen=True):
    """State of a container: podman's ``status``, its init's pid on the host (0 when there is none), exit code."""

    id: str
    name: str
    status: str
    pid: int
    exit_code: int
    bundle: Path
    ip: str | None
    mac: str | None
    labels: dict[str, str]

    @property
    def alive(self) -> bool:
        return self.status in ALIVE


class Podman:
    """The operations on containers, over one podman service."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def create(self, spec: ContainerSpec) -> str:
        """Create (not start) a container and return its id. Raises BusyError if the name is taken."""
        try:
            answer = self.api.call("POST", "/containers/create", body=_specification(spec))
        except NotFoundError as error:
            raise UsageError(f"podman could not create {spec.name}", cause=error.cause) from error
        except Exception as error:
            if "already in use" in str(getattr(error, "cause", "")):
                raise BusyError(
                    f"a container named {spec.name} exists already",
                    remedy=f"podman rm -f {spec.name}, if it is not needed",
                ) from error
            raise
        return str(answer["Id"])

    def start(self, container: str) -> None:
        self.api.call("POST", f"/containers/{container}/start")

    def prepare(self, container: str) -> None:
        """Bring a created container to the state that podman restores into: exited, with its runtime configuration.

        Its program never runs: the runtime's init waits before exec, and is killed there.
        """
        self.api.call("POST", f"/containers/{container}/init")
        self.api.call("POST", f"/containers/{container}/stop", timeout=0)

    def inspect(self, container: str) -> Container:
        """The container's state; raises NotFoundError if there is none of that name or id."""
        data = self.api.call("GET", f"/containers/{container}/json")
        state, networks = data["State"], data["NetworkSettings"].get("Networks") or {}
        address: dict[str, Any] = next(iter(networks.values()), {})
        return Container(
            id=data["Id"],
            name=data["Name"],
            status=state["Status"],
            pid=int(state.get("Pid") or 0),
            exit_code=int(state.get("ExitCode") or 0),
            bundle=Path(data["StaticDir"]),
            ip=address.get("IPAddress") or None,
            mac=address.get("MacAddress") or None,
            labels=data["Config"].get("Labels") or {},
        )

    def list(self, owner: Path) -> list[dict[str, Any]]:
        """All containers of the gpuckpt with the state folder ``owner``, running or not.

        Each has ``id``, ``name``, ``state``, ``labels``, ``pid``.
        """
        import json

        found = (
            self.api.call("GET", "/containers/json", all=True, filters=json.dumps({"label": [f"{OWNER}={owner}"]}))
            or []
        )
        return [
            {
                "id": entry["Id"],
                "name": entry["Names"][0],
                "state": entry["State"],
                "labels": entry.get("Labels") or {},
                "pid": entry.get("Pid", 0),
            }
            for entry in found
        ]

    def checkpoint(self, container: str, *, leave_running: bool, tcp_established: bool) -> dict[str, int]:
        """Dump the container into its bundle's ``checkpoint`` folder; returns CRIU's statistics (microseconds)."""
        answer = self.api.call(
            "POST",
            f"/containers/{container}/checkpoint",
            keep=True,
            printStats=True,
            leaveRunning=leave_running,
            tcpEstablished=tcp_established,
        )
        return dict(answer.get("criu_statistics") or {}) if isinstance(answer, dict) else {}

    def restore(self, container: str, owner: Path, *, tcp_established: bool, limit: float = 600) -> dict[str, int]:
        """Restore the container from its bundle's ``checkpoint`` folder; returns CRIU's statistics (microseconds).

        podman deletes the images after a restore unless told to keep them; a golden's are always kept. One that takes
        longer than ``limit`` seconds is ended: DeadlineError. ``owner`` as for :meth:`remove`.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            leftovers.end_restore(container, owner)

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            answer = self.api.call(
                "POST",
                f"/containers/{container}/restore",
                keep=True,
                printStats=True,
                tcpEstablished=tcp_established,
            )
        except GpuckptError as error:
            if late.is_set():
                raise DeadlineError(f"the restore hung: it was ended after {limit:.0f} s", cause=error.cause) from error
            raise
        finally:
            timer.cancel()
        return dict(answer.get("criu_statistics") or {}) if isinstance(answer, dict) else {}

    def end_restore(self, container: str, owner: Path) -> None:
        """Kill a restore of ``owner``'s container that is still at work though nobody waits for it any more."""
        leftovers.end_restore(container, owner)

    def remove(self, container: str, owner: Path) -> None:
        """Kill and remove the container of the gpuckpt with the state folder ``owner``.

        None of that name is fine too, and one of somebody else's, whose name it may have by chance, is left alone.
        """
        with contextlib.suppress(NotFoundError):
            found = self.inspect(container)
            if found.labels.get(OWNER) != str(owner):
                return
            if found.pid and found.status != "paused":
                # What is frozen by a control group of version 1 does not even die, and podman would wait for that. But
                # what podman has paused itself it also thaws, and fails where that is done.
                with contextlib.suppress(GpuckptError, OSError):
                    freezer.thaw(found.pid, found.id)
            leftovers.unmount_yards(found.bundle)
            try:
                self._delete(container)
            except GpuckptError as error:
                if "state improper" not in str(error.cause):
                    raise
                self._delete(container)  # it has ended in this moment, and podman had wanted to kill it
            leftovers.forget(found.id)

    def _delete(self, container: str) -> None:
        self.api.call("DELETE", f"/containers/{container}", force=True, timeout=0, v=False)

    def logs(self, container: str, *, most: int | None = None) -> str:
        """What the container printed (both outputs): all, or what is in the last ``most`` bytes of its log."""
        data = self.api.call("GET", f"/containers/{container}/json")
        return logs.read(Path(data["HostConfig"]["LogConfig"]["Path"]), most)

    def wait_for_log(self, container: str, timeout: float) -> None:
        """Wait, at most ``timeout`` seconds, until an ending container has ended and all that it printed is in its log.

        conmon writes the log, and its end is the last thing that happens. Until then podman may say that the container
        runs, though its server is gone.
        """
        data = self.api.call("GET", f"/containers/{container}/json")
        # podman forgets conmon's number with the container's end; the file stays.
        with contextlib.suppress(FileNotFoundError, ValueError):
            proc.wait_for_end(int(Path(data["ConmonPidFile"]).read_text()), data["Id"], timeout)

    def volume(self, name: str) -> Path | None:
        """Where the content of a named volume lies on the host, or None if there is no such volume."""
        try:
            return Path(self.api.call("GET", f"/volumes/{name}/json")["Mountpoint"])
        except NotFoundError:
            return None

    def create_volume(self, name: str) -> Path:
        """Create a named volume and return where its content lies."""
        return Path(self.api.call("POST", "/volumes/create", body={"Name": name})["Mountpoint"])

    def remove_volume(self, name: str) -> None:
        """Remove a named volume; none of that name is fine too. BusyError if a container uses it."""
        with contextlib.suppress(NotFoundError):
            self.api.call("DELETE", f"/volumes/{name}")

    def image_digest(self, image: str) -> str:
        """The id of a local image; raises NotFoundError with the remedy if podman does not have it."""
        from urllib.parse import quote

        try:
            return str(self.api.call("GET", f"/images/{quote(image, safe='')}/json")["Id"])
        except NotFoundError as error:
            raise NotFoundError(
                f"no image {image} on this machine", cause=error.cause, remedy=f"podman pull {image}"
            ) from error

    def image_layers(self, image: str) -> tuple[Path, ...]:
        """The folders of the image's layers, the uppermost first (podman's overlay storage driver)."""
        from urllib.parse import quote

        data = self.api.call("GET", f"/images/{quote(image, safe='')}/json").get("GraphDriver", {}).get("Data") or {}
        if "UpperDir" not in data:
            raise PreflightError(
                f"the layers of image {image} are not folders here",
                cause="podman's storage driver is not overlay",
                remedy="use the overlay driver, or --rootfs",
            )
        return tuple(Path(word) for word in (data["UpperDir"], *data.get("LowerDir", "").split(":")) if word)

    def image_config(self, image: str) -> dict[str, Any]:
        """The image's ``Config``: Env, Cmd, Entrypoint, WorkingDir, User."""
        from urllib.parse import quote

        return dict(self.api.call("GET", f"/images/{quote(image, safe='')}/json").get("Config") or {})


def _specification(spec: ContainerSpec) -> dict[str, Any]:
    launch = spec.launch
    body: dict[str, Any] = {
        "name": spec.name,
        "rootfs": str(spec.rootfs),
        "command": list(launch.argv),
        "env": launch.env,
        "work_dir": launch.workdir,
        "user": launch.user,
        "hostname": spec.hostname,
        "labels": {LABEL: spec.replica, "gpuckpt.golden": spec.golden, **spec.labels},
        "annotations": {"org.criu.config": str(spec.criu_config)},
        "seccomp_profile_path": str(spec.seccomp),
        # The host's own files, seen through the overlay and the mounts, carry labels that a confined container may not
        # read; what confines it here are namespaces, capabilities and seccomp.
        "selinux_opts": ["disable"],
        "r_limits": [{"type": limit.name, "soft": limit.soft, "hard": limit.hard} for limit in launch.ulimits],
        # podman's own /dev/shm is a mount outside the container and no part of a dump; without an IPC namespace of
        # podman's making, a tmpfs of the container's own takes its place, and CRIU carries it.
        "ipcns": {"nsmode": "none"},
        "mounts": [
            {
                "type": "tmpfs",
                "source": "tmpfs",
                "destination": "/dev/shm",
                "options": ["rw", "nosuid", "nodev", "mode=1777", f"size={launch.shm_size}"],
            },
            *(_bind(*bind) for bind in spec.binds),
        ],
        "volumes": [{"Name": volume.name, "Dest": volume.destination} for volume in launch.volumes],
        "image_volume_mode": "ignore",
        "stop_timeout": 10,
        "log_configuration": {"driver": "k8s-file"},  # whose file we read
    }
    if spec.devices:
        # Files, or names of the Container Device Interface, which podman knows from one another.
        body["devices"] = [{"path": path} for path in spec.devices]
    if launch.port:
        body["netns"] = {"nsmode": "bridge"}
        body["portmappings"] = [
            {
                "host_ip": launch.port.host_ip,
                "host_port": launch.port.host_port,
                "container_port": launch.port.container_port,
                "protocol": "tcp",
            }
        ]
        if spec.ip or spec.mac:
            network: dict[str, Any] = {}
            if spec.ip:
                network["static_ips"] = [spec.ip]
            if spec.mac:
                network["static_mac"] = spec.mac
            body["Networks"] = {"podman": network}
    else:
        body["netns"] = {"nsmode": "none"}
    return body


def _bind(source: str, destination: str, read_only: bool) -> dict[str, Any]:
    options = ["rbind", "ro" if read_only else "rw", "rprivate"]
    return {"type": "bind", "source": source, "destination": destination, "options": options}


def container_name(replica: str) -> str:
    """The name under which podman knows a replica."""
    return PREFIX + replica
