"""Read a checkpoint: configuration, tokenizer, image processor and where each tensor lies. No torch."""
