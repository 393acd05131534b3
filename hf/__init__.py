"""A trained model as a folder that the transformers library loads: python -m export --format hf."""
