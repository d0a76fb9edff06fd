"""Compute, launch and compile the cross-attention kernel in Triton, ahead of time and without a GPU."""
