"""The OpenAI-compatible server over an Engine."""
