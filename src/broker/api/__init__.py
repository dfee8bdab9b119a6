"""The one door: what callers from outside may ask, with their permissions checked."""
