"""Runs: a request becomes an engine plan, the plan an engine, the engine's stream the conversation's envelopes."""
