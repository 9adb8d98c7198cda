"""Commands as users start them, in processes of their own."""

import os
import socket
import subprocess
import sys
import time

COMMAND = [sys.executable, "-c", "from gradnorm_jax.cli import main; main()"]


def one_device(cache):
    """The environment of processes with one device each, which share what they compile."""
    return os.environ | {
        "XLA_FLAGS": "",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(environment, *arguments, cwd=None):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(environment, count, *arguments):
    """Starts one program of several processes."""
    where = ["--distributed", f"localhost:{free_port()}", count]
    return [start(environment, *arguments, *where, i) for i in range(count)]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def end(processes, timeout=120):
    """Stderr, stdout and status of each."""
    return [
        (*process.communicate(timeout=timeout)[::-1], process.returncode) for process in processes
    ]


def wait_for(path, timeout=60):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
