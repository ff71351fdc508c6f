"""Match: calls of convs and linears, and the parameters that their weights come from."""
