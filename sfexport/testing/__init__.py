"""Make small random checkpoints and tokenizers, for tests, benchmarks and users' own tests."""
