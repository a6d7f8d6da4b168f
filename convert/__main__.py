"""`python -m convert` is `main.py convert`."""

import sys

from ernie_jax.cli import main

if __name__ == "__main__":
    main([sys.argv[0], "convert", *sys.argv[1:]])
