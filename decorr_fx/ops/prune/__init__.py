"""The algebra of pruning: what units carry, their order, and how many stay."""
