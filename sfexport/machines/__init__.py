"""Machines: what one is (looked at through probe.py), and which ones engines are built for (targets.toml)."""
