"""Comparison of pruning methods."""
