"""The guest server: ``python -m gpuckpt_guest serve --model FOLDER``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, probe it, serve it. Exit codes: 0 ended by a signal, 2 usage, 4 the model is refused."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.kv_disk_mib is not None and options.kv_dir is None:
        parser.error("--kv-disk-mib is for files: say where with --kv-dir")
    if options.weights_outside and options.weights_mib is not None:
        parser.error("--weights-outside is for weights that are all on the device, --weights-mib for such that are not")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log = logging.getLogger("gpuckpt_guest")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    # A thread that holds the interpreter gives it up after this long: the default of 5 ms is a whole resume.
    sys.setswitchinterval(0.0005)
    from .api.app import application
    from .durable import Durable
    from .engine.engine import Engine
    from .engine.memory import Budgets
    from .engine.model import load
    from .engine.stepper import UnsupportedModelError

    try:
        loaded = load(
            options.model,
            device=options.device,
            dtype=options.dtype,
            name=options.served_model_name or "",
            limit=options.max_model_len,
            weights=None if options.weights_mib is None else options.weights_mib << 20,
            outside=options.weights_outside,
        )
    except UnsupportedModelError as error:
        print(f"gpuckpt_guest: {options.model} cannot be served: {error}", file=sys.stderr)
        return 4
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        print(f"gpuckpt_guest: {options.model} cannot be loaded: {error}", file=sys.stderr)
        return 4
    log.info("%s: %s", loaded.name, loaded.verdict)
    budgets = Budgets(
        device=None if options.kv_mib is None else options.kv_mib << 20,
        host=None if options.kv_host_mib is None else options.kv_host_mib << 20,
        disk=(65536 if options.kv_disk_mib is None else options.kv_disk_mib) << 20,
        folder=options.kv_dir.absolute() if options.kv_dir else None,
    )
    try:
        budgets.check(loaded.device)
        engine = Engine(
            loaded,
            budgets=budgets,
            ring_bytes=options.ring_mib << 20,
            max_batch=options.max_batch,
            max_sessions=options.max_sessions,
        )
        if options.kv_dir is not None:
            with torch.inference_mode():
                log.info(
                    "of the sessions kept in %s %d are here, %d cannot be", options.kv_dir, *Durable(engine).find()
                )
    except BlockingIOError:
        print(f"gpuckpt_guest: another server keeps its sessions in {options.kv_dir}", file=sys.stderr)
        return 4
    except (OSError, ValueError) as error:
        what = "there is no memory for sessions"
        if isinstance(error, OSError) and error.filename is not None:
            what = f"sessions cannot be kept in {options.kv_dir}"
        print(f"gpuckpt_guest: {what}: {error}", file=sys.stderr)
        return 4
    engine.start()
    orders = None
    if options.weights_outside:
        from .control import Control, where
        from .engine.sleep import handlers

        try:
            orders = Control(handlers(engine))
        except OSError as error:
            print(f"gpuckpt_guest: no orders can be taken at {where()}: {error}", file=sys.stderr)
            engine.stop()
            return 4
    import uvicorn

    address = {"uds": options.uds} if options.uds else {"host": options.host, "port": options.port}
    server = uvicorn.Server(
        uvicorn.Config(
            application(engine),
            log_level="warning",
            access_log=False,
            loop="asyncio",
            timeout_graceful_shutdown=5,
            **address,
        )
    )
    server.run()
    if orders is not None:
        orders.close()
    engine.stop()
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is none of 1, 2, 3 …")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpuckpt_guest", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model whose generations can be stopped between any two layers")
    serve.add_argument("--model", required=True, help="folder of a checkpoint")
    serve.add_argument("--served-model-name", help="the name that clients use; default: the folder's")
    serve.add_argument("--uds", help="listen on this Unix socket")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1 …")
    serve.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    serve.add_argument("--max-model-len", type=_positive, help="the most tokens of a session; default: the model's")
    serve.add_argument("--max-batch", type=_positive, default=64, help="the most sessions in one batch")
    serve.add_argument("--max-sessions", type=_positive, default=4096)
    mib: dict[str, Any] = {"type": _positive, "metavar": "MIB"}
    serve.add_argument("--weights-mib", **mib, help="device memory for the layers' weights; default: for all that fit")
    serve.add_argument(
        "--weights-outside", action="store_true", help="weights can be given back and taken again, by a Unix socket"
    )
    serve.add_argument("--kv-mib", **mib, help="device memory for keys and values; default: most of what is free")
    serve.add_argument(
        "--kv-host-mib", **mib, help="host memory for those that have left the device; default: a quarter of it"
    )
    serve.add_argument("--kv-disk-mib", **mib, help="and in files, if --kv-dir is given; default: 65536")
    serve.add_argument("--kv-dir", type=Path, help="folder for them, and for sessions that are to outlive the server")
    serve.add_argument("--ring-mib", type=_positive, default=64, help="host memory for activations of stopped sessions")
    serve.add_argument("--threads", type=_positive, help="threads of one operation on the CPU; default: torch's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
