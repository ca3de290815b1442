"""The session engine: a generation that stops between two layers, and goes on."""
