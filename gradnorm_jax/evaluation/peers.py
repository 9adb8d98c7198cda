"""What the processes of a program tell each other about themselves, beside what they compute.

A process that fails leaves the others waiting for it in the next computation that they share, and
one that is killed cannot even say so. So each of them shows signs of life in the store of JAX's
coordination service, writes there that it has failed, and looks there for the others. Whatever
happens to one, all end, within `PATIENCE_SECONDS` and half a minute, with a sentence that says why.

The first process hosts that service. When it is killed, JAX aborts the others at once (SIGABRT).
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from jax._src import distributed
from jax.errors import JaxRuntimeError

from gradnorm_jax.evaluation.hosts import Interrupted

PATIENCE_SECONDS = 60.0
"""How long a process may show no sign of life before it counts as gone."""
_BEAT_SECONDS = 2.0
_GRACE_SECONDS = 10.0

_STATE: Any = distributed.global_state
_BEATS, _FATE, _LEFT = (f"gradnorm_jax/{name}/" for name in ("beats", "fate", "left"))
_FAILED, _GONE = "failed", "gone"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A block that fails in every process if it fails in one. A single process is not watched.

    A process that waits on its devices for another, so that it cannot fail by itself, is ended by
    `leave`. After a failure the program has to be started again.

    Raises:
        ConnectionAbortedError: another process has failed.
        Interrupted: another process is gone.
    """
    if _STATE.client is None:
        yield
        return
    finished = threading.Event()
    watch = threading.Thread(target=_watch, args=[finished], daemon=True)
    watch.start()
    try:
        yield
    except (Interrupted, ConnectionAbortedError):
        raise  # the others know
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            _blame_others()
        _settle(_FAILED, _STATE.process_id)
        raise
    except BaseException:
        _settle(_FAILED, _STATE.process_id)
        raise
    finally:
        finished.set()
        watch.join()


def check_peers() -> None:
    """Fails if another process has failed or is gone, as far as is known; takes half a millisecond.

    Raises:
        ConnectionAbortedError: it has failed.
        Interrupted: it is gone.
    """
    if _STATE.client is None:
        return
    for _, value in _STATE.client.key_value_dir_get(_FATE):
        fate, process = value.split()
        which = f"process {process} of {_STATE.num_processes}"
        if fate == _GONE:
            raise Interrupted(f"{which} is gone; start the same line again on all to go on")
        raise ConnectionAbortedError(f"{which} has failed; it says why")


def leave(status: int) -> NoReturn:
    """Ends this process at once, the first one last.

    Python's own way out would have JAX wait for processes that are gone or stuck.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(JaxRuntimeError):
        _wait_to_be_last()
    os._exit(status)


def _wait_to_be_last() -> None:
    client, process = _STATE.client, _STATE.process_id
    client.key_value_set(f"{_LEFT}{process}", "")
    deadline = time.monotonic() + 2 * _BEAT_SECONDS + _GRACE_SECONDS
    while process == 0 and time.monotonic() < deadline:
        if len(client.key_value_dir_get(_LEFT)) == _STATE.num_processes:
            deadline = 0.0
        time.sleep(0.2)


def _settle(fate: str, process: int) -> None:
    """Tells all what has happened to a process, unless something else has happened before."""
    with contextlib.suppress(JaxRuntimeError):
        _STATE.client.key_value_set(f"{_FATE}first", f"{fate} {process}")


def _blame_others() -> None:
    """Fails if another process turns out to be what an error of the runtime comes from."""
    deadline = time.monotonic() + PATIENCE_SECONDS + 2 * _BEAT_SECONDS
    while time.monotonic() < deadline:
        check_peers()
        time.sleep(_BEAT_SECONDS / 4)


def _watch(finished: threading.Event) -> None:
    client = _STATE.client
    heard: dict[str, tuple[str, float]] = {}
    for beat in itertools.count():
        try:
            client.key_value_set(f"{_BEATS}{_STATE.process_id}", str(beat), True)
            now = time.monotonic()
            for key, value in client.key_value_dir_get(_BEATS):
                before, since = heard.get(key, ("", now))
                heard[key] = value, since if value == before else now
                if now - since > PATIENCE_SECONDS and value == before:
                    _settle(_GONE, int(key.removeprefix(_BEATS)))
            check_peers()
        except (Interrupted, ConnectionAbortedError) as error:
            if not finished.wait(_GRACE_SECONDS):
                print(f"gradnorm-jax: {error}", file=sys.stderr)
                leave(os.EX_TEMPFAIL if isinstance(error, Interrupted) else 1)
            return
        except JaxRuntimeError:
            return  # the service has ended, and JAX says so
        if finished.wait(_BEAT_SECONDS):
            return
