"""``gpuckpt restore``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, print_table, say, seconds
from gpuckpt.errors import UsageError
from gpuckpt.golden.identity import FIELDS

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.golden.restore import Restored
    from gpuckpt.golden.tools import Tools
    from gpuckpt.timing import PhaseTable


@click.command()
@click.argument("name", required=False, shell_complete=golden_names)
@click.option("--no-canary", is_flag=True, help="Do not replay the canary; only wait for health.")
@click.option("--keep", is_flag=True, help="Keep CRIU's log and statistics in the replica's folder.")
@click.option("--criu", "criu_path", metavar="PATH", help="The criu program to use.")
@click.option("--ignore-static-ip", is_flag=True, help="Take any address on the bridge, not the golden's.")
@click.option("--ignore-static-mac", is_flag=True, help="Take any hardware address, not the golden's.")
@click.option("--ignore-volumes", is_flag=True, help="Leave volumes that are made anew empty.")
@click.option("--ignore-rootfs", is_flag=True, help="Do not bring back the files that the server had written.")
@click.option("--tcp-established", is_flag=True, help="Restore open TCP connections (the golden must hold them).")
@click.option(
    "--ignore-identity",
    multiple=True,
    type=click.Choice(FIELDS),
    help="Restore although this field of the machine differs; repeatable, at your own risk.",
)
@click.option("--no-huge-pages", is_flag=True, help="Do not switch transparent huge pages on for the restore.")
@click.option("--fallback", type=click.Choice(["cold"]), help="Start the server cold if it cannot be restored.")
@click.option("--stage", is_flag=True, help="A golden on disk: copy it into the tmpfs first, and keep it there.")
@click.option("--import", "archive", metavar="FILE", help="Import the golden from this archive first.")
@click.option("--trust", is_flag=True, help="With --import: trust the archive's processes to run as root.")
@click.option("--digest", metavar="HEX", help="With --import: the blake3 digest that `gpuckpt export` printed.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str | None, as_json: bool, **options: Any) -> None:
    """Bring the golden NAME back as a running replica of the same name, and check its answer."""
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.doctor import require
    from gpuckpt.golden.restore import RestoreRequest, restore
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import open_store, tools
    from gpuckpt.timing import PhaseTable, now_ns, process_started_ns

    if not options["archive"] and (options["trust"] or options["digest"] is not None):
        raise UsageError("--trust and --digest are about an archive", remedy="add --import FILE, or leave them out")
    phases = PhaseTable(started_ns=process_started_ns())
    settings = settings_from(ctx, criu__path=options["criu_path"])
    phases.add("start-up", phases.started_ns, now_ns())
    with progress(quiet=as_json and not sys.stderr.isatty()) as report:
        with phases.phase("preflight"):
            require(settings, "restore")
            for line in sweep(settings, lambda: tools(settings)):
                report.note(line)
        if options["archive"]:
            from gpuckpt.golden.archive import import_golden

            with phases.phase("import"):
                open_store(settings)
                name = import_golden(
                    settings, Path(options["archive"]), name=name, trust=options["trust"], digest=options["digest"]
                ).name
        chosen = name or settings.create.name
        if not chosen:
            raise UsageError("no name of a golden is given", remedy="gpuckpt restore NAME; gpuckpt ls shows the names")
        with phases.phase("podman service"):
            work = tools(settings, report=report)
        if options["stage"]:
            _stage(settings, work, phases, chosen)
        request = RestoreRequest(
            name=chosen,
            canary=not options["no_canary"],
            keep=options["keep"],
            ignore_static_ip=options["ignore_static_ip"],
            ignore_static_mac=options["ignore_static_mac"],
            ignore_volumes=options["ignore_volumes"],
            ignore_rootfs=options["ignore_rootfs"],
            tcp_established=options["tcp_established"],
            ignore_identity=options["ignore_identity"],
            huge_pages=not options["no_huge_pages"],
            fallback=options["fallback"],
            start_timeout=settings.create.start_timeout,
        )
        restored = restore(request, work, phases)
    if as_json:
        print_json(_document(restored))
    else:
        _show(restored)


def _stage(settings: Settings, work: Tools, phases: PhaseTable, name: str) -> None:
    from gpuckpt.errors import NothingToDo
    from gpuckpt.golden import tiers
    from gpuckpt.golden.tools import open_store, phase

    work.layout.golden(name)
    with phase(work, phases, "stage"), contextlib.suppress(NothingToDo):
        open_store(settings)
        tiers.place(work.layout, name, "tmpfs", work.report)


def _document(restored: Restored) -> dict[str, Any]:
    endpoint = restored.replica.endpoint
    return {
        "replica": restored.replica.name,
        "golden": restored.replica.golden,
        "container": restored.replica.container,
        "tier": restored.replica.tier,
        "memory": restored.replica.memory,
        "socket": str(endpoint.socket) if endpoint.socket else None,
        "url": None if endpoint.socket else str(endpoint),
        "ttft_s": restored.ttft_s,
        "first_token_monotonic_ns": restored.first_token_ns,
        "canary_match": restored.canary_match,
        "wall_s": restored.phases.wall_seconds,
        "phases": restored.phases.as_list(),
        "fallback": restored.fallback_reason.as_dict() if restored.fallback_reason else None,
    }


def _show(restored: Restored) -> None:
    rows = [(row.name, seconds(row.seconds)) for row in restored.phases.rows()]
    rows.append(("wall time", seconds(restored.phases.wall_seconds)))
    print_table(["PHASE", "TIME"], rows, right=["TIME"], bold_last=True)
    click.echo()
    if restored.fallback_reason:
        say(f"started cold, because: {restored.fallback_reason.message}")
    ttft = f", first token after {restored.ttft_s:.3f} s" if restored.ttft_s is not None else ""
    how = "started cold" if restored.replica.tier == "cold" else f"memory by {restored.replica.memory}"
    canary = {True: ", canary equal", None: ""}[restored.canary_match or None]
    click.echo(f"replica {restored.replica.name} is ready ({how}{ttft}{canary})")
    endpoint = restored.replica.endpoint
    hint = f"curl --unix-socket {endpoint.socket} http://localhost/…" if endpoint.socket else f"curl {endpoint}/…"
    click.echo(f"ask it:  {hint}")
    click.echo(f"stop it: gpuckpt stop {restored.replica.name}")
