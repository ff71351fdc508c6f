"""Prune: units followed through an exported graph, measured and cut."""
