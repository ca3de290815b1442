"""Device state of processes."""
