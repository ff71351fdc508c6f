"""Capture: the graph of every module that may call a conv or linear."""
