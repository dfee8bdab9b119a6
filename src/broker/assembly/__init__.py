"""Assembly: puts a broker together, starts it, keeps it tidy and stops it."""
