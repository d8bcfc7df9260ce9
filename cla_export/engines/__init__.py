"""Executors: each runs one step of a model on some runtime, over caches allocated once."""
