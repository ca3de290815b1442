"""The machine: preflight checks, tmpfs, huge pages, limits, identity."""
