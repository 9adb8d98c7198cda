"""What every reader owes its users, whatever it is given."""

import contextlib

import pytest


@contextlib.contextmanager
def an_answer_or_a_sentence(mention=""):
    """Fails unless its body ends well, or with a ValueError or OSError that says something.

    Names in it may have line ends, which the command line escapes.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sentence = str(error)
        if not sentence or str(mention) not in sentence:
            pytest.fail(f"not a sentence that names {mention}: {sentence!r}")
