"""Cost of decorrelation on many ranks, from shapes alone."""
