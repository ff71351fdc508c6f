"""The state of a site: its R, its weights, checkpoints and shards."""
