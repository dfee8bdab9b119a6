"""Delivery: from what the log committed to what each connection is sent."""
