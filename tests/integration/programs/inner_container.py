"""Start a container as the daemon does: through a podman service that is our child. Argument: the container's name."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuckpt.config_load import load
from gpuckpt.containers import rootfs, service
from gpuckpt.criu.binary import find
from gpuckpt.host import limits
from gpuckpt.store.layout import Layout

name = sys.argv[1]
settings = load(None, environ={}, env_file=None, flags={}).settings
layout = Layout.of(settings)
layout.prepare()
api = service.connect(layout.run, find(settings, None, cache=layout.run).path)
folder = settings.paths.state / "inner"
folder.mkdir()
ulimits = [one for one in limits.container_ulimits() if one["Name"] != "memlock"]
body = {
    "name": name,
    "rootfs": str(rootfs.mount(folder, [Path("/")])),
    "command": ["/bin/sleep", "1000"],
    "netns": {"nsmode": "none"},
    "r_limits": [{"type": one["Name"], "soft": one["Soft"], "hard": one["Hard"]} for one in ulimits],
}
made = api.call("POST", "/containers/create", body=body)["Id"]
api.call("POST", f"/containers/{made}/start")
