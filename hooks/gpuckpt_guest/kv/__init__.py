"""Where sessions keep their keys and values."""
