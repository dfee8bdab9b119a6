"""The timeline: a conversation folded into entities, each with a version and a position (I5, I15)."""
