"""The version, where the build can read it without importing JAX."""

VERSION = "0.1.0"
