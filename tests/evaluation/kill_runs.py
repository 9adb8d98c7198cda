"""Starts a run over and over, each time killing it at a random moment, and at last leaves it alone.

    python kill_runs.py FOLDER KILLS OPTIONS...

OPTIONS are those of `gradnorm-jax evaluate`. A run to FOLDER/undisturbed is never killed; runs to
FOLDER/0, FOLDER/1, ... are killed up to five times each, until there have been KILLS in all. Runs
are forked from a process that has imported everything and started nothing, which saves the seconds
that starting Python takes.
"""

import itertools
import os
import random
import signal
import sys
import threading
import time

import matplotlib.figure  # noqa: F401
import tyro

from gradnorm_jax.cli.evaluate import EvaluateOptions, run_evaluate
from gradnorm_jax.data import schedule
from gradnorm_jax.evaluation import sinks


def fork_run(options, out, kill_after=None):
    """Whether the run came to its end; if not, it was killed."""
    child = os.fork()
    if not child:
        if kill_after is not None:
            threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        run_evaluate(tyro.cli(EvaluateOptions, args=[*options, "--out", out]))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def main():
    folder, kills, *options = sys.argv[1:]
    schedule.PART_SIZE = 8
    fork_run(options, f"{folder}/first")  # fills the compilation cache
    start = time.monotonic()
    assert fork_run(options, f"{folder}/undisturbed")
    duration = time.monotonic() - start
    moment = random.Random(0)
    killed = 0
    for number in itertools.count():
        # Statistics are saved after every part, or at the end alone.
        sinks.SAVE_SECONDS = (-1.0, 60.0)[number % 2]
        for _ in range(5):
            if fork_run(options, f"{folder}/{number}", moment.uniform(0.1, 0.7) * duration):
                break
            killed += 1
        assert fork_run(options, f"{folder}/{number}")
        if killed >= int(kills):
            return


main()
