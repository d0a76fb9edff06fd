"""sfexport: Slow-Fast Video MLLM checkpoints to engines that answer questions about videos offline."""

__version__ = "0.1.0"
