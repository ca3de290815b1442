"""``python -m tests.guest.architectures --json FILE`` tries the whole catalogue and writes what came out.

The tests do the same, one architecture each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from hooks.gpuckpt_guest.engine.stepper import UnsupportedModelError

from .catalogue import CATALOGUE
from .trials import trials


def main(argv: Sequence[str] | None = None) -> int:
    """Try all and write the counts. Exit codes: 0 everything is equal, 1 something is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.architectures", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--only", nargs="*", help="names out of the catalogue")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.monotonic()
    stops, failures, refused, accepted = 0, [], {}, 0
    for architecture in CATALOGUE:
        if options.only and architecture.name not in options.only:
            continue
        try:
            for name, outcome in trials(architecture):
                stops += outcome.cuts
                failures += [f"{architecture.name}: {name}: {failure}" for failure in outcome.failures]
        except UnsupportedModelError as error:
            refused[architecture.name] = str(error)
            continue
        except Exception as error:
            failures.append(f"{architecture.name}: {type(error).__name__}: {error}")
        accepted += 1
        print(f"{architecture.name}: {stops} cuts, {len(failures)} failures", file=sys.stderr)
    facts = {
        "architectures": accepted,
        "cuts": stops,
        "failures": len(failures),
        "refused": refused,
        "seconds": round(time.monotonic() - began, 1),
    }
    for failure in failures:
        print(failure, file=sys.stderr)
    text = json.dumps(facts, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
