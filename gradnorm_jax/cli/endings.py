"""How a command ends: with one sentence and a status, whatever was to be foreseen."""

import contextlib
import lzma
import os
import select
import signal
import sys
import traceback
import zlib
from collections.abc import Iterator
from typing import Any

from gradnorm_jax.text import printable

FORESEEN = (
    EOFError,
    ImportError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    zlib.error,
)
FOUND = 3
"""The status of what --fail-on-ood and --fail-on-drift ask for."""
UNUSABLE = os.EX_DATAERR
"""The status if an image could not be scored: 65."""
RESUME = "run the same command again to resume"

_INTERRUPTED = 128 + signal.SIGINT
_BROKEN_PIPE = 128 + signal.SIGPIPE


class Signals:
    """What Ctrl-C and SIGTERM do: they end the command, the latter by `should_stop` once polled."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._received = self._polled = False

    def should_stop(self) -> bool:
        """Whether SIGTERM has come."""
        self._polled = True
        return self._received

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Takes signals until its body ends."""
        handlers = {signal.SIGTERM: self._terminate, signal.SIGINT: self._interrupt}
        before = {number: signal.signal(number, take) for number, take in handlers.items()}
        try:
            yield
        finally:
            for number, take in before.items():
                signal.signal(number, take)

    def _terminate(self, *_: Any) -> None:
        self._received = True
        if not self._polled:
            _leave(f"stopped; {RESUME}", os.EX_TEMPFAIL)

    def _interrupt(self, *_: Any) -> None:
        _leave(f"interrupted; {RESUME}", _INTERRUPTED)


def _leave(sentence: str, status: int) -> None:
    # Not by an exception, which may come wherever Python is called from C, to be lost there or to
    # abort the process. Nothing is lost: files are written whole or not at all.
    show_cursor = "\r\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}gradnorm-jax: {sentence}\n".encode())
    os._exit(status)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Ends the program as is fit for what its body raises.

    Status 1 and a sentence: something is wrong with the input, or the machine. 141: nobody reads
    the output any more. 70 (EX_SOFTWARE), with a traceback: an error of this library's own. Beside
    these, 75 (EX_TEMPFAIL) means that the same command, run again, resumes, and 130 Ctrl-C; 2 is
    a command line that cannot be parsed. `score` and `watch` end with `FOUND` and `UNUSABLE` too.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except FORESEEN as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_broken():
            sys.exit(_BROKEN_PIPE)
        _end(_describe(error), 1)
    except Exception:
        traceback.print_exc()
        _end(
            "this should not have happened; please report the lines above with the command and "
            "`gradnorm-jax --version`, unless they end in a module of your own",
            os.EX_SOFTWARE,
        )


def tell(sentence: str) -> None:
    """Says something on stderr, where it is in nobody's way."""
    print(f"gradnorm-jax: {printable(sentence)}", file=sys.stderr)


def _end(sentence: str, status: int) -> None:
    if status == 1:
        sys.exit(f"gradnorm-jax: {printable(sentence)}")
    tell(sentence)
    sys.exit(status)


def _describe(error: BaseException) -> str:
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"the memory does not suffice; give a smaller --batch-size ({reason})"
    if type(error).__name__ != "JaxRuntimeError":
        return reason
    # The runtime's errors go on for pages.
    reason = reason.partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in reason:
        return f"the devices are out of memory; give a smaller --batch-size: {reason}"
    return f"the devices or their runtime have failed: {reason}"


def _is_stdout_broken() -> bool:
    waiting = select.poll()
    waiting.register(sys.stdout, 0)
    broken = any(event & select.POLLERR for _, event in waiting.poll(0))
    if broken:
        # What is left in the buffer must not raise once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken
