"""How a broker is put together, started, kept tidy and stopped."""
