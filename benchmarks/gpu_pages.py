"""The words of the acceptance on a GPU, out of its document alone; of a dry run no number is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_record import Document
from benchmarks.gpu_steps import STEPS
from benchmarks.pages import table, verdict
from benchmarks.style import short, size

CAPTIONS = {
    "suspend": "How long each step of suspending and resuming takes, by the memory that the process holds",
    "servers": "First tokens from the golden and from standby",
    "memory": "What of the device is held by what runs and by what is suspended",
}
DRY = "**This is a dry run on stand-ins: nothing in it was measured, and no number is shown.**"
_HEAD = ("results", "8B, golden", "8B, standby", "1.5B, golden", "1.5B, standby", "suspended", "steps", "targets met")


def page(document: Document, title: str, figures: Sequence[str]) -> str:
    """One page: the headline, targets, each part that was measured, every step, what was not measured and why."""
    sections = [
        [f"# {title}{' (dry run)' if document['dry'] else ''}", "", headline(document), "", where(document)],
        ["## Targets", "", *table(("", "wanted", "measured", "n", ""), list(map(verdict, document["targets"])))],
        *([] if document["dry"] else [list(part(document)) for part in (_servers, _where, _phases, _engine)]),
        [line for name in figures for line in ("", f"![{_caption(name)}]({name}.png)")],
        list(_steps(document)),
        list(_missing(document)),
        ["Generated from the JSON beside it" + ("." if document["dry"] else ": `python -m benchmarks.report --gpu`.")],
    ]
    return "\n\n".join("\n".join(lines).strip("\n") for lines in sections if lines) + "\n"


def write(document: Document, file: Path, figures: Sequence[str]) -> Path:
    """The page beside the document's file."""
    made = file.with_suffix(".md")
    made.write_text(page(document, "Acceptance on a GPU", figures))
    return made


def _caption(figure: str) -> str:
    word = figure.removeprefix("gpu-dry-").removeprefix("gpu_")
    return CAPTIONS[word] + (" (dry run: nothing was measured)" if figure.startswith("gpu-dry-") else "")


def where(document: Document) -> str:
    """The machine, in one line; of a dry run only that it does not matter."""
    if document["dry"]:
        return "The machine is of no importance: no device and no container had a part in it."
    machine = document["machine"]
    gpu = "; ".join(machine["gpus"]) or "no GPU"
    found = {name: document["steps"].get(f"probe.{name}", {}).get("data", {}) for name in ("driver", "python")}
    cuda = f"CUDA {found['driver'].get('cuda') or 'unknown'}, PyTorch {found['python'].get('torch') or 'none'}"
    return (
        f"{gpu}; {cuda}. {machine['cpu_model']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB;"
        f" Linux {machine['kernel']}, CRIU {machine['criu']}, podman {machine['podman']}; gpuckpt {machine['commit']}."
    )


def headline(document: Document) -> str:
    """The one sentence that a hurried reader takes along."""
    if document["dry"]:
        return DRY
    found = document.get("ttft", {}).get("guest-8b-eager", {})
    tiers = [f"{short(found[tier]['p50'])} {words}" for tier, words in _WORDS.items() if tier in found]
    if tiers:
        return f"**The 8B model's first token: {', '.join(tiers)}, from the command on.**"
    counts = document["counts"]
    return f"**The 8B model was not measured: {counts['ok']} of {len(STEPS)} steps went well in this run.**"


_WORDS = {"golden": "from the golden", "standby": "from standby"}


def index(found: Sequence[tuple[str, Document]]) -> list[str]:
    """Lines of the index of all results, for these folders and their documents; dry ones have no place there."""
    measured = [(folder, document) for folder, document in found if not document["dry"]]
    if not measured:
        return []
    about = "On a GPU: first tokens (p50) from the golden and from standby, device memory of what is suspended."
    return [about, "", *table(_HEAD, [_row(folder, document) for folder, document in measured]), ""]


def _row(folder: str, document: Document) -> list[str]:
    def of(shape: str, tier: str) -> str:
        one = document.get("ttft", {}).get(f"guest-{shape}-eager", {}).get(tier)
        return short(one["p50"]) if one else "–"

    known = [target for target in document["targets"] if target["met"] is not None]
    held = document.get("suspended_bytes_most")
    return [
        f"[{folder}]({folder}/README.md)",
        *(of(shape, tier) for shape in ("8b", "1_5b") for tier in ("golden", "standby")),
        "–" if held is None else size(held) if held else "0",
        f"{document['counts']['ok']} of {len(STEPS)}",
        f"{sum(bool(target['met']) for target in known)} of {len(known)}",
    ]


def _servers(document: Document) -> Iterator[str]:
    if not document.get("ttft"):
        return
    yield from ("## Servers", "")
    rows = []
    for name, one in document["ttft"].items():
        times = []
        for tier in ("golden", "standby"):
            found = one.get(tier)
            times += [short(found["p50"]), short(found["p95"]), str(found["n"])] if found else ["–"] * 3
        cold = one.get("cold_s")
        rows.append([name.replace("_", "."), size(one["bytes"]), short(cold) if cold else "–", *times])
    head = ("", "weights", "cold, once", "golden p50", "p95", "n", "standby p50", "p95", "n")
    yield from table(head, rows)
    yield from ("", "From just before the command is spawned to the first streamed token, the container's creation"
                " included. Cold is the server's own start in `gpuckpt create`.")  # fmt: skip
    if turns := document["steps"].get("server.turns", {}).get("data", {}).get("swap_ttft_s"):
        yield from ("", f"Models in turns on one GPU, from the order to suspend one to the first token of the next: p50"
                    f" {short(turns['p50'])}, p95 {short(turns['p95'])}, n = {turns['n']}.")  # fmt: skip


def _where(document: Document) -> Iterator[str]:
    """Where the time goes, for the largest model that was measured."""
    found = [(name, one) for name, one in document.get("ttft", {}).items() if one["phases"]["golden"]]
    if not found:
        return
    name, largest = max(found, key=lambda item: float(item[1]["bytes"]))
    yield from (f"## Where the time goes: {name.replace('_', '.')}", "")
    for words, phases in largest["phases"].items():
        if phases:
            told = [f"{phase} {short(seconds)}" for phase, seconds in phases.items()]
            yield from (f"- {_PHASES[words]}: {', '.join(told)}.",)
    yield from ("", "Medians of each phase, as the commands tell them; they need not add up to a median.")


_PHASES = {
    "golden": "From the golden, to the first token",
    "suspend": "`gpuckpt suspend`",
    "wake": "`gpuckpt wake`, without the question that follows",
}


def _phases(document: Document) -> Iterator[str]:
    if not document.get("phases"):
        return
    yield from ("## Suspend and resume, by bytes", "")
    rows = []
    for one in sorted(document["phases"].values(), key=lambda one: float(one["bytes"])):
        cells = [short(one[f"{step}_s"]["p50"]) for step in ("lock", "checkpoint", "restore", "unlock")]
        speeds = [f"{one[f'{step}_gbps']['p50']:.1f}" for step in ("checkpoint", "restore")]
        rows.append([size(one["bytes"]), *cells, *speeds, str(one["checkpoint_s"]["n"])])
    yield from table(("", "lock", "checkpoint", "restore", "unlock", "out, GB/s", "in, GB/s", "n"), rows)
    steps = document["steps"]
    if pair := steps.get("phases.pair", {}).get("data", {}):
        yield from ("", f"Two processes of {size(pair['bytes_each'])}, off the device and back: side by side"
                    f" {short(pair['together_s']['p50'])}, one after the other {short(pair['in_turn_s']['p50'])},"
                    f" n = {pair['together_s']['n']}.")  # fmt: skip
    ways = steps.get("phases.program", {}).get("data", {})
    if "helper" in ways and "program" in ways:
        words = [f"{name} {short(ways[name]['cycle_s']['p50'])}" for name in ("helper", "program")]
        held = size(ways["helper"]["bytes"])
        yield from ("", f"The same cycle of {held} by gpuckpt's helper and by NVIDIA's program:"
                    f" {', '.join(words)}.")  # fmt: skip
    for name, one in steps.get("phases.criu", {}).get("data", {}).get("sizes", {}).items():
        if "restore_s" in one:
            yield from ("", f"Plain CRIU with {name} GB of device memory in its image: dump {short(one['dump_s'])},"
                        f" restore {short(one['restore_s'])}, once.")  # fmt: skip


def _engine(document: Document) -> Iterator[str]:
    rows = []
    if found := document.get("activation"):
        for name, share in found["share"].items():
            rows.append(
                [f"share of {found['bandwidth_gbps']:.1f} GB/s that an activation of {name} gets", f"{share:.2f}"]
            )
    if (share := document.get("paging_share")) is not None:
        rows.append(["a session's way off the device and back, over bare copies, the slower way", f"{share:.2f}"])
    if found := document.get("oversubscribed"):
        rows.append([f"{found['sessions']} sessions in half of their memory: answered", str(found["completed"])])
        rows.append(["of them with other tokens or bits", str(found["mismatches"])])
        rows.append(["their time over undisturbed", f"{found['seconds_over_undisturbed']:.2f} ×"])
    if rows:
        yield from ("## The session engine", "", *table(("", "measured"), rows))


def _steps(document: Document) -> Iterator[str]:
    """Every step with its status; its seconds are those of the step, not of what it measures."""
    yield from ("## Steps", "")
    rows = []
    for step in STEPS:
        kept = document["steps"].get(step.name)
        took = f"{kept['seconds']:.0f} s" if kept and not document["dry"] else "–"
        rows.append([step.name, kept["status"] if kept else "not reached", took])
    yield from table(("", "status", "took"), rows)


def _missing(document: Document) -> Iterator[str]:
    if document["dry"]:
        failed = {name: step["reason"] for name, step in document["steps"].items() if step["status"] != "ok"}
        yield from ("## What did not go well", "") if failed else ()
        yield from (f"- `{name}`: {reason}." for name, reason in failed.items())
        return
    if document["not_measured"]:
        yield from ("## Not measured", "")
        for reason, names in _by_reason(document["not_measured"]).items():
            yield f"- {', '.join(f'`{name}`' for name in names)}: {reason}."


def _by_reason(missing: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in missing.items():
        found.setdefault(reason, []).append(name)
    return found


def lines(document: Document) -> list[str]:
    """The targets for people on a terminal."""
    if document["dry"]:
        return ["  a dry run: nothing was measured"]
    made = []
    for target in document["targets"]:
        name, limit, value, n, met = verdict(target)
        made.append(f"  {name:<78} {value:>12}  {limit:<14} n = {n:<4} {met}")
    return made
