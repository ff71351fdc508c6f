"""What happens around a step of the optimizer: hooks, batches, the exchange between ranks."""
