"""Packages that only some of this library needs, and the extras that bring them."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Says which extra is missing, if an import in its body fails.

    Args:
        extra: the name of the extra.
        what: what needs it, the subject of a sentence in the plural.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} need {error.name}, which is not installed: "
            f"pip install 'gradnorm-jax[{extra}]'",
            name=error.name,
        ) from error
