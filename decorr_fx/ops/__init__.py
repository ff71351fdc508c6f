"""Tensors in, tensors out: the mathematics of decorrelation, without a layer, a graph or an optimizer in sight."""
