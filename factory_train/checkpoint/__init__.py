"""Checkpoints: our own format over safetensors and JSON, its commit, and its verified load (docs/checkpoint-format.md)."""
