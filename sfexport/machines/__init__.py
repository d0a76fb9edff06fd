"""Detect this machine (machine.py, through probe.py) and read the targets that engines are built for (targets.py)."""
