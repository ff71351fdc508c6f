"""Rewrite: insert what decorrelates, and take it out again."""
