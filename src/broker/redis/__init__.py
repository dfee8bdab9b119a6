"""The way to Redis: one connection that all stores of a broker share."""
