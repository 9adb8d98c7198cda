"""The command line, `gradnorm-jax`."""

import sys

from gradnorm_jax.cli.endings import Terminator, sentences


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; see `gradnorm_jax.cli.endings.sentences` for how it ends."""
    terminator = Terminator()
    with sentences(), terminator.installed():
        # Only now: it takes seconds, in which signals may come too.
        from gradnorm_jax.extras import needs_extra

        with needs_extra("data", "commands"):
            from gradnorm_jax.cli.commands import run
        run(sys.argv[1:] if arguments is None else arguments, terminator.poll)
