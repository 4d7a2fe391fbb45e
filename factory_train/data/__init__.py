"""Text to training rows: source, tokenizer, shards, sample order, loader."""
