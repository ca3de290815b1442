"""Freeze a warmed-up model server into a golden and restore it in a fraction of a second."""

__version__ = "0.1.0"
