"""Language models: the architectures, text generation, and the Hugging Face layout."""
