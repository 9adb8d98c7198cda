"""The command `gradnorm-jax`, also started by `python -m gradnorm_jax`."""

import sys

import gradnorm_jax
from gradnorm_jax.extras import needs_extra


def main() -> None:
    """Runs one command, if what commands need is installed."""
    if sys.argv[1:] == ["--version"]:
        print(f"gradnorm-jax {gradnorm_jax.__version__}")
        return
    try:
        with needs_extra("data", "commands"):
            from gradnorm_jax import cli
    except ModuleNotFoundError as error:
        sys.exit(f"gradnorm-jax: {error}")
    cli.main()


if __name__ == "__main__":
    main()
