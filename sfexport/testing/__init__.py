"""Small checkpoints and tokenizers, made at random, for tests, benchmarks and users' own tests."""
