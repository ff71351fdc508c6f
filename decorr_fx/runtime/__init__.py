"""What lives beside a layer while it trains: its factors and buffers, and the moment at which R moves."""
