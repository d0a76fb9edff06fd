"""TensorRT: checks, builds, plugins and the runtime."""
