"""Checks of whole libraries of models."""
