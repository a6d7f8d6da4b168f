"""Convert ERNIE 4.5 checkpoints: Hugging Face (or Paddle) safetensors to Orbax and back.

The only place that knows foreign tensor names; `python -m convert` is `main.py convert`.
"""

from convert.converter import convert
from convert.exporter import export
from convert.source import is_hub_id
from convert.verifier import verify

__all__ = ["convert", "export", "is_hub_id", "verify"]
