"""``gpuckpt ls``."""

from __future__ import annotations

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, print_table, say, size


@click.command()
@format_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool) -> None:
    """List goldens, newest last, and the replicas restored from them, also those whose golden is gone."""
    from gpuckpt.golden import catalogue
    from gpuckpt.golden import replica as replicas
    from gpuckpt.golden.tools import tools
    from gpuckpt.store.layout import Layout

    settings = settings_from(ctx)
    layout = Layout.of(settings)
    made = replicas.all_of(layout.replicas)
    # podman is only asked when there is something to ask about.
    states = catalogue.states(tools(settings)) if made else {}
    names = set(layout.names())
    listens = {one.name: str(one.endpoint) for one in made}
    orphans = [one for one in made if one.golden not in names]
    found = sorted(catalogue.entries(layout, states), key=lambda one: one.manifest.created if one.manifest else "")
    if as_json:
        print_json(
            {
                "goldens": [
                    {
                        "name": one.name,
                        "tiers": list(one.tiers),
                        "created": one.manifest.created if one.manifest else None,
                        "workload": one.manifest.workload.kind if one.manifest else None,
                        "model": one.manifest.workload.model if one.manifest else None,
                        "image_bytes": one.manifest.sizes.total if one.manifest else None,
                        "canary": bool(one.manifest and one.manifest.canary),
                        "cold_ttft_s": one.manifest.cold_ttft_s if one.manifest else None,
                        "trouble": one.trouble,
                        "replicas": [
                            {"name": name, "state": state, "listens": listens.get(name)} for name, state in one.replicas
                        ],
                    }
                    for one in found
                ],
                "replicas_without_golden": [
                    {"name": one.name, "golden": one.golden, "state": catalogue.state_of(one, states)}
                    for one in orphans
                ],
            }
        )
        return
    if not found and not orphans:
        say("no goldens yet; make one: gpuckpt create NAME -- --model /path/to/model")
        return
    rows = []
    for one in found:
        running = ", ".join(f"{name} ({state})" for name, state in one.replicas) or "–"
        if one.manifest is None:
            rows.append((one.name, "+".join(one.tiers), "damaged", "", "", "", running))
            continue
        what = one.manifest.workload.kind + (f" {one.manifest.workload.model}" if one.manifest.workload.model else "")
        created = one.manifest.created.replace("T", " ")[:16]
        total, cold = size(one.manifest.sizes.total), f"{one.manifest.cold_ttft_s:.1f} s"
        rows.append((one.name, "+".join(one.tiers), what, created, total, cold, running))
    for golden in sorted({one.golden for one in orphans}):
        left = [f"{one.name} ({catalogue.state_of(one, states)})" for one in orphans if one.golden == golden]
        rows.append((golden, "–", "gone", "", "", "", ", ".join(left)))
    columns = ["NAME", "TIER", "SERVES", "CREATED (UTC)", "SIZE", "COLD TTFT", "REPLICAS"]
    print_table(columns, rows, right=["SIZE", "COLD TTFT"])
