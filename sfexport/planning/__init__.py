"""Compute the memory and speed of a checkpoint on a target before any build: `sfexport plan`."""
