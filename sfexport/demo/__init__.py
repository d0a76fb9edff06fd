"""The demo: its clips, the shipped model, and one run from the checkpoint to parity."""
