"""Which replica wakes, freezes, dies: pure decisions, and the one loop that owns all state."""
