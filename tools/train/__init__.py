"""Training with and without decorrelation, side by side."""
