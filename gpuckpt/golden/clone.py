"""What makes a replica itself: clones of one golden begin with the same memory, and must not stay the same.

Each gets a host name of its own (in the images, see :mod:`gpuckpt.criu.view`), and before its processes run again the
file ``identity`` beside its socket, by which guest code reseeds its random generators (hooks/gpuckpt_guest).
"""

from __future__ import annotations

import json
import os

from gpuckpt.golden.replica import Replica

IDENTITY = "identity"
_SEED_BYTES = 32


def identify(replica: Replica) -> None:
    """Write the identity of ``replica`` with a fresh seed; one rename, so that a reader never sees half of it."""
    identity = {"replica": replica.name, "golden": replica.golden, "seed": os.urandom(_SEED_BYTES).hex()}
    temporary = replica.folder / "identity.new"
    temporary.write_text(json.dumps(identity))
    temporary.chmod(0o644)  # read by the server, whatever user it runs as
    temporary.replace(replica.sockets / IDENTITY)
