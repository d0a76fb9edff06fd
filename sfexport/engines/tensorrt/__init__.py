"""Check and build engines for TensorRT, register its plugins, and run engines."""
