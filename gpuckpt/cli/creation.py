"""Turn the options of ``gpuckpt create`` into a request: parse, check, complete from the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from gpuckpt.config import Settings, parse_size
from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.golden.launch import CreateRequest
from gpuckpt.host.tmpfs import memory_total
from gpuckpt.manifest import Mount, Port, Request, Volume, Workload
from gpuckpt.store.layout import check_name
from gpuckpt.workload import Guest, Http, Vllm
from gpuckpt.workload.base import Adapter

_DEFAULT_PORT = 8000


def request_from(
    settings: Settings, name: str | None, arguments: tuple[str, ...], options: dict[str, Any]
) -> CreateRequest:
    """The request for a golden; raises UsageError or NotFoundError naming the option that is wrong."""
    chosen = name or settings.create.name
    if not chosen:
        raise UsageError("no name for the golden", remedy="gpuckpt create NAME …, or set create.name (CONT_NAME)")
    check_name(chosen)
    for argument in arguments:
        _check_passed(argument, "the server's arguments")
    image = settings.create.image
    if image and options["rootfs"]:
        raise UsageError("--image and --rootfs exclude each other", remedy="give one of them")
    mounts, volumes = _volumes(options["volume"])
    return CreateRequest(
        name=chosen,
        adapter=_adapter(settings, chosen, arguments, options),
        arguments=arguments,
        image=image,
        rootfs=_folder(options["rootfs"] or "/"),
        publish=port_from(settings.create.publish) if settings.create.publish else None,
        env=_environment(options["env"]),
        mounts=mounts,
        volumes=volumes,
        workdir=options["workdir"],
        shm_size=_size(options["shm_size"]),
        warmup=settings.create.warmup,
        prompts=settings.create.prompts,
        start_timeout=settings.create.start_timeout,
        canary=not options["no_canary"],
        leave_running=options["leave_running"],
        tcp_established=options["tcp_established"],
        replace=options["replace"],
        mode=options["mode"],
        gpus=_gpus(options["gpus"]),
        graphs=_graphs(options),
        weights=_weights(options),
    )


def _gpus(names: tuple[str, ...]) -> tuple[str, ...]:
    """What ``--gpu`` names, as the Container Device Interface does."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", name):
            raise UsageError(f"--gpu: “{_shown(name)}” names no GPU", remedy="all, an index (0) or a UUID (GPU-…)")
    if "all" in names and len(names) > 1:
        raise UsageError("--gpu all names every GPU", remedy="leave the others out, or leave all out")
    return tuple(dict.fromkeys(names))


def _graphs(options: dict[str, Any]) -> bool:
    if options["cuda_graphs"] and not options["gpus"]:
        raise UsageError("--cuda-graphs is for servers on a GPU", remedy="add --gpu all, or leave it out")
    return bool(options["cuda_graphs"])


def _weights(options: dict[str, Any]) -> Literal["auto", "image", "outside"]:
    chosen: Literal["auto", "image", "outside"] = options["weights"]
    if chosen == "outside" and options["no_canary"]:
        raise UsageError(
            "--weights outside needs a canary",
            cause="only its answer tells whether weights that were read again are the same",
            remedy="leave --no-canary out",
        )
    return chosen


def unheard(request: CreateRequest) -> str | None:
    """What to say where nothing tells the server where to listen; None where something does."""
    place, variable = ("{port}", "PORT") if request.publish else ("{socket}", "GPUCKPT_SOCKET")
    if not isinstance(request.adapter, Http) or any(place in word for word in request.arguments):
        return None
    return f"no argument holds {place}: a server that does not listen where ${variable} says is waited for in vain"


def _adapter(settings: Settings, name: str, arguments: tuple[str, ...], options: dict[str, Any]) -> Adapter:
    kind = options["workload"]
    if kind == "auto":
        kind = "http" if arguments and not arguments[0].startswith("-") else "vllm"
    if kind == "vllm":
        return Vllm.from_arguments(arguments, model=settings.create.model, name=name)
    requests = tuple(_request(text) for text in options["warmup_request"])
    if kind == "guest":
        return Guest.from_arguments(arguments, model=settings.create.model, name=name, warmup_requests=requests)
    return Http(
        Workload(
            kind="http",
            health_path=_path(options["health_path"], "--health-path"),
            canary_request=_request(options["canary"]) if options["canary"] else None,
            warmup_requests=requests,
        )
    )


def _request(text: str) -> Request:
    words = text.split(None, 2)
    remedy = "write 'METHOD /path [BODY]', for example 'GET /health'"
    if len(words) < 2 or not words[1].startswith("/"):
        raise UsageError(f"“{_shown(text)}” is not a request", remedy=remedy)
    if not re.fullmatch(r"[A-Za-z]+", words[0]):
        raise UsageError(f"“{_shown(words[0])}” is no HTTP method", cause="a method is letters", remedy=remedy)
    body = words[2] if len(words) > 2 else ""
    if not _is_text(body):
        raise UsageError(f"the body of “{_shown(' '.join(words[:2]))}” is not valid UTF-8", remedy="write it as UTF-8")
    return Request(method=words[0].upper(), path=_path(words[1], "the request"), body=body)


def _path(text: str, what: str) -> str:
    # It goes into the request line as it is: a control character would end that, and other letters have no place there.
    if not re.fullmatch(r"/[!-~]*", text):
        raise UsageError(
            f"{what}: “{_shown(text)}” is not a path",
            cause="a path begins with / and holds printable ASCII characters without blanks",
            remedy="write anything else as %XX, for example /caf%C3%A9",
        )
    return text


def _is_text(text: str) -> bool:
    """Is ``text`` valid UTF-8? Bytes of the command line that are none arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    """``text`` with what cannot be printed escaped."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in safe)


def _check_passed(text: str, what: str) -> str:
    """Return ``text`` if it can be handed to podman, in JSON, and to a program, as a C string."""
    if "\0" in text or not _is_text(text):
        raise UsageError(
            f"{what}: “{_shown(text)}” cannot be passed to the server",
            cause="it holds a NUL byte" if "\0" in text else "it is not valid UTF-8",
            remedy="write it as UTF-8 text, or let the server read it from a file",
        )
    return text


def _environment(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"“{_shown(pair)}” is not NAME=VALUE", remedy="for example --env HF_HOME=/models")
        _check_passed(pair, "--env")
        found[key] = value
    return found


def _volumes(texts: tuple[str, ...]) -> tuple[tuple[Mount, ...], tuple[Volume, ...]]:
    mounts: list[Mount] = []
    volumes: list[Volume] = []
    for text in texts:
        source, _, rest = text.partition(":")
        destination, _, mode = rest.partition(":")
        if not destination.startswith("/") or mode not in ("", "ro", "rw"):
            raise UsageError(f"“{text}” is not a volume", remedy="write SOURCE:/path[:rw], for example /models:/models")
        if source.startswith(("/", ".")):
            path = Path(source).resolve()
            if not path.exists():
                raise NotFoundError(f"--volume: there is no {path}", remedy="create it, or correct the path")
            mounts.append(Mount(source=str(path), destination=destination, read_only=mode != "rw"))
        else:
            volumes.append(Volume(name=check_name(source), destination=destination))
    return tuple(mounts), tuple(volumes)


def port_from(text: str) -> Port:
    """``[IP:]HOST_PORT[:CONTAINER_PORT]``; the container's port defaults to the host's. UsageError if it is none."""
    match = re.fullmatch(r"(?:\[([^]]+)\]:|(\d+(?:\.\d+)+):)?(\d+)(?::(\d+))?", text)
    if match is None or not all(0 < int(port) < 65536 for port in match.groups()[2:] if port):
        raise UsageError(f"“{text}” is not a port to publish", remedy=f"for example --publish {_DEFAULT_PORT}")
    ip = match[1] or match[2] or "127.0.0.1"
    return Port(host_ip=ip, host_port=int(match[3]), container_port=int(match[4] or match[3]))


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise NotFoundError(f"no root file system at {path}", remedy="correct --rootfs")
    return path


def _size(text: str) -> int:
    try:
        found = int(str(parse_size(text)))
    except ValueError as error:
        raise UsageError(f"--shm-size: {error}", remedy="for example --shm-size 2GiB") from error
    memory = memory_total()
    if not found or found > memory > 0:
        raise UsageError(
            f"--shm-size cannot be {text}",
            # tmpfs(5): a size of 0 is no limit at all.
            cause=f"this machine has {memory >> 20} MiB of memory" if found else "0 would be no limit at all",
            remedy="for example --shm-size 2GiB",
        )
    return found
