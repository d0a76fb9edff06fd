"""The cross-attention kernel in Triton: its maths, its launches, and ahead-of-time compilation without a GPU."""
