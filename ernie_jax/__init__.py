"""ERNIE 4.5 in JAX: convert once, then generate, serve and fine-tune with one sharded model."""
