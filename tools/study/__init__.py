"""Studies of how fast methods learn."""
