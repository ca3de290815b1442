"""The daemon of the warm pool: systemd life cycle, OpenAI-compatible front, admin API, metrics, dashboard."""
