"""Measurement of training steps."""
