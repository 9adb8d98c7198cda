"""Commands as users start them, in processes of their own."""

import os
import subprocess
import sys
import time

MAIN = "from gradnorm_jax.cli import main; main()"


def one_device(cache):
    """The environment of processes with one device each, which share what they compile."""
    return os.environ | {
        "XLA_FLAGS": "",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(environment, *arguments, cwd=None, code=MAIN):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes, timeout=120):
    """Stderr, stdout and status of each."""
    return [
        (*process.communicate(timeout=timeout)[::-1], process.returncode) for process in processes
    ]


def succeed(*processes):
    """Waits for processes that are to end well."""
    for stderr, _, status in end(processes, timeout=300):
        assert status == 0, stderr


def evaluate_command(options):
    """The arguments for options by name."""
    return ["evaluate", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def wait_for(path, timeout=60):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_files(folder):
    """The contents of a run's files, but for its config, which names it, and times in a journal."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del found["config.json"]
    return {name: content for name, content in found.items() if not name.startswith("journal/")}
