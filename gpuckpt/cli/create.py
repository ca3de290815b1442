"""``gpuckpt create``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, print_table, seconds, size

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.golden.launch import CreateRequest


class _Command(click.Command):
    """Takes what follows `--` as the server's arguments, untouched; click itself would drop the mark."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        mark = args.index("--") if "--" in args else len(args)
        ctx.meta[_SERVER] = tuple(args[mark + 1 :])
        return super().parse_args(ctx, args[:mark])


_SERVER = "gpuckpt.server_arguments"


@click.command(cls=_Command)
@click.argument("words", nargs=-1, metavar="[NAME] [-- SERVER ARGS…]")
@click.option("--image", metavar="IMAGE", help="Container image to run (it must be on this machine).")
@click.option("--rootfs", metavar="PATH", help="Folder to use as root file system, unchanged.  [default: /]")
@click.option(
    "--workload",
    type=click.Choice(["auto", "vllm", "guest", "http"]),
    default="auto",
    show_default=True,
    help="Kind of server; auto: vllm if SERVER ARGS begin with an option or are empty, else http.",
)
@click.option("--model", metavar="PATH", help="Model to serve (vllm, guest); same as `-- --model PATH`.")
@click.option("--publish", "-p", metavar="[IP:]PORT[:PORT]", help="Publish a TCP port on a bridge network.")
@click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Environment of the server; repeatable.")
@click.option(
    "--volume",
    "-v",
    multiple=True,
    metavar="SOURCE:PATH[:rw]",
    help="Mount a folder of the host (read-only unless :rw) or a named volume; repeatable.",
)
@click.option("--workdir", metavar="PATH", help="Working directory inside the container.")
@click.option("--shm-size", metavar="SIZE", default="1GiB", show_default=True, help="Limit of the server's /dev/shm.")
@click.option("--warmup", type=int, metavar="N", help="Number of warm-up requests.  [default: 3]")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt of the warm-up (vllm); repeatable.")
@click.option("--health-path", metavar="PATH", default="/health", show_default=True, help="Health check (http).")
@click.option(
    "--warmup-request", multiple=True, metavar="'METHOD PATH [BODY]'", help="Warm-up request (http, guest); repeatable."
)
@click.option("--canary", metavar="'METHOD PATH [BODY]'", help="Request whose answer repeats (http).")
@click.option("--no-canary", is_flag=True, help="Record no canary: restores cannot be checked by an answer.")
@click.option("--start-timeout", metavar="DURATION", help="Longest wait for health.  [default: 10min]")
@click.option("--leave-running/--stop", default=False, help="Leave the original server running, or stop it (default).")
@click.option("--tcp-established", is_flag=True, help="Keep open TCP connections in the golden.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "mapped", "copy"]),
    default="auto",
    show_default=True,
    help="How memory comes back: mapped from files or, page by page, copied. auto: mapped wherever that is safe.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="all|INDEX|UUID",
    help="Give the server GPUs, as CDI names them; repeatable. all: a replica may come back on another one.",
)
@click.option("--cuda-graphs", is_flag=True, help="Capture CUDA graphs (vllm, --gpu): faster steps, a longer creation.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "image", "outside"]),
    default="auto",
    show_default=True,
    help="Where a model's weights are kept: in the image, or outside it, in a file that replicas share. auto: outside"
    " on a GPU, if the canary proves that they can be read again.",
)
@click.option("--replace", is_flag=True, help="Replace an existing golden of this name, in one step.")
@click.option("--criu", "criu_path", metavar="PATH", help="The criu program to use.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Start a server, wait for health, warm it up and freeze it into the golden NAME.

    \b
    gpuckpt create qwen -- --model /models/qwen2-0.5b --max-model-len 2048
    gpuckpt create site --rootfs / --canary 'GET /' -- python3 /srv/app.py {socket}
    """
    from gpuckpt.cli.creation import unheard
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.create import create
    from gpuckpt.golden.doctor import require
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import open_store, tools
    from gpuckpt.timing import PhaseTable, now_ns, process_started_ns

    phases = PhaseTable(started_ns=process_started_ns())
    settings, request = _request(ctx, words, options)
    phases.add("start-up", phases.started_ns, now_ns())
    with progress(quiet=as_json and not sys.stderr.isatty()) as report:
        if told := unheard(request):
            report.note(told)
        with phases.phase("checks"):
            require(settings, "create")
            if open_store(settings):
                report.note(f"mounted a tmpfs for goldens at {settings.store.path}")
            for line in sweep(settings, lambda: tools(settings)):
                report.note(line)
            work = tools(settings, report=report)
        created = create(request, work, phases)
    manifest = created.manifest
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "folder": str(created.folder),
                "image_bytes": manifest.sizes.total,
                "cold_ttft_s": manifest.cold_ttft_s,
                "first_token_monotonic_ns": created.first_token_ns,
                "canary": manifest.canary is not None,
                "memory": manifest.memory.mode,
                "weights": "outside" if manifest.weights else "image",
                "gpu_bytes": manifest.gpu.bytes if manifest.gpu else 0,
                "wall_s": phases.wall_seconds,
                "phases": phases.as_list(),
                "left_running": str(created.replica.endpoint) if created.replica else None,
            }
        )
        return
    print_table(["PHASE", "TIME"], [(row.name, seconds(row.seconds)) for row in phases.rows()], right=["TIME"])
    how = "mapped" if manifest.memory.mode == "mapped" else f"copied ({manifest.memory.reason or '--mode copy'})"
    click.echo(f"\ngolden {manifest.name}: {size(manifest.sizes.total)}, cold first token {manifest.cold_ttft_s:.2f} s")
    click.echo(f"its memory will be {how}")
    if manifest.gpu:
        held = ", ".join(f"{size(one.bytes)} on {one.name}" for one in manifest.gpu.devices)
        click.echo(f"a replica takes {held}")
    if manifest.weights:
        click.echo(f"of this its weights, beside the image: {size(manifest.sizes.weights)}")
    if created.replica:
        click.echo(f"the server keeps running on {created.replica.endpoint}")
    else:
        click.echo(f"restore it with: gpuckpt restore {manifest.name}")


def _request(ctx: click.Context, words: Sequence[str], options: Mapping[str, Any]) -> tuple[Settings, CreateRequest]:
    from gpuckpt.cli.creation import request_from

    settings = settings_from(
        ctx,
        create__model=options["model"],
        create__image=options["image"],
        create__publish=options["publish"],
        create__warmup=options["warmup"],
        create__prompts=options["prompts"],
        create__start_timeout=options["start_timeout"],
        criu__path=options["criu_path"],
    )
    if len(words) > 1:
        raise click.UsageError(
            f"“{words[1]}” is one word too many: the server's arguments come after `--`: "
            f"gpuckpt create {words[0]} -- {' '.join(words[1:])} …"
        )
    return settings, request_from(settings, words[0] if words else None, ctx.meta[_SERVER], dict(options))


def requested(ctx: click.Context, name: str, words: Sequence[str]) -> CreateRequest:
    """What ``gpuckpt create NAME WORDS`` asks for. Raises click.UsageError, UsageError, NotFoundError."""
    with command.make_context("create", [name, *words], parent=ctx) as made:
        return _request(made, made.params["words"], made.params)[1]
