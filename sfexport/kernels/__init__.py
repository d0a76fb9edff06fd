"""The cross-attention kernel in Triton: its maths, its launch plan, and compiling it ahead of time without a GPU."""
