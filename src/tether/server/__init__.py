"""Models behind an OpenAI-compatible port, on the serving engine of transformers."""
