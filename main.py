"""The command line: `python main.py help` lists the commands."""

from ernie_jax.cli import main

if __name__ == "__main__":
    main()
