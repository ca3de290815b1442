"""``gpuckpt inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, many, print_json, print_table, seconds, size

if TYPE_CHECKING:
    from gpuckpt.manifest import Manifest


@click.command()
@click.argument("name", shell_complete=golden_names)
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str, as_json: bool) -> None:
    """Show what a golden holds, without restoring it: sizes, processes, sockets, identity, canary."""
    from msgspec import to_builtins

    from gpuckpt import manifest as manifests
    from gpuckpt.manifest import Process
    from gpuckpt.store.layout import Layout

    layout = Layout.of(settings_from(ctx))
    folder = layout.golden(name)
    tiers = list(layout.tiers(name))
    golden = manifests.read(folder)
    if as_json:
        document = {key: value for key, value in to_builtins(golden).items() if key not in ("files", "links")}
        print_json({**document, "folder": str(folder), "tiers": tiers, "image_bytes": golden.sizes.total})
        return
    identity, launch = golden.identity, golden.launch
    base = f"image {launch.image}" if launch.image else f"root folder {launch.rootfs}"
    facts = [
        ("name", golden.name),
        ("created", f"{golden.created} by gpuckpt {golden.gpuckpt}"),
        ("tier", "+".join(tiers)),
        ("folder", str(folder)),
        ("serves", f"{golden.workload.kind} {golden.workload.model or ''}".strip()),
        ("command", " ".join(launch.argv)),
        ("listens on", f"port {launch.port.host_port}" if launch.port else "a Unix socket"),
        ("base", f"{base}, {len(identity.base.files) or ''} files held, {identity.base.digest[:19]}"),
        ("made on", f"kernel {identity.kernel}, CRIU {identity.criu}, {identity.runtime}, {identity.cpu_model}"),
        ("GPU", _gpu(golden)),
        ("capabilities", " ".join(launch.capabilities)),
        ("canary", f"{len(golden.canary.tokens)} tokens with logprobs" if golden.canary and golden.canary.tokens
         else "an answer" if golden.canary else "none"),
        ("cold TTFT", seconds(golden.cold_ttft_s)),
    ]  # fmt: skip
    print_table(["", ""], facts)
    sizes = golden.sizes
    click.echo("\nSizes")
    rows = [
        ("CPU pages, copied", sizes.cpu_pages),
        ("CPU pages, mapped", sizes.mapped_pages),
        ("weights", sizes.weights),
        ("GPU", sizes.gpu),
        ("shared memory", sizes.shared_memory),
    ]
    rows += [("root file system", sizes.rootfs), ("CRIU metadata", sizes.metadata), ("total", sizes.total)]
    print_table(["", "BYTES"], [(label, size(count)) for label, count in rows], right=["BYTES"])
    memory = golden.memory
    click.echo(f"\nMemory: {memory.mode}" + (f", {memory.reason}" if memory.reason else ""))
    if memory.mode == "mapped":
        click.echo(
            f"  {memory.mappings} mappings, {size(memory.shared)} shared, {size(memory.zeros)} of zeros left out"
        )
    if memory.copied:
        names = {process.pid: process.name for process in golden.processes}
        print_table(
            ["COPIED", "PID", "BYTES", "WHY"],
            [(names.get(one.pid, "?"), str(one.pid), size(one.bytes), one.reason) for one in memory.copied],
            right=["PID", "BYTES"],
        )
    click.echo("\nProcesses")
    depth: dict[int, int] = {}

    def row(process: Process) -> tuple[str, str, str, str]:
        depth[process.pid] = depth.get(process.parent, -1) + 1
        name = "  " * depth[process.pid] + process.name
        return name, str(process.pid), str(process.threads), size(process.pages_bytes)

    print_table(["NAME", "PID", "THREADS", "PAGES"], map(row, golden.processes), right=["PID", "THREADS", "PAGES"])
    if golden.sockets:
        click.echo("\nSockets")
        for line in golden.sockets:
            click.echo(f"  {line}")


def _gpu(golden: Manifest) -> str:
    if golden.gpu is None:
        return "none"
    held = ", ".join(f"{size(one.bytes)} on {one.name} {one.uuid}" for one in golden.gpu.devices)
    return f"{held}, of {many(len(golden.gpu.processes), 'process')}; driver {golden.identity.driver}"
