"""podman: create, start, checkpoint, restore, remove containers; the only package that knows it."""
