"""The command `gradnorm-jax`, also started by `python -m gradnorm_jax`."""

import sys

import gradnorm_jax
from gradnorm_jax import cli


def main() -> None:
    """Runs one command."""
    if sys.argv[1:2] == ["--version"]:
        print(f"gradnorm-jax {gradnorm_jax.__version__}")
        return
    cli.main()


if __name__ == "__main__":
    main()
