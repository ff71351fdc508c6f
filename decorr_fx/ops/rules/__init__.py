"""Rules: how R moves, given rows of its input."""
