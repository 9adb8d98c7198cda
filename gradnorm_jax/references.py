"""Objects in modules by the names that users write: `package.module:object`."""

import importlib
import re
from typing import Any


def is_reference(text: str) -> bool:
    """Whether `text` has the form `package.module:object`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None


def load_reference(text: str) -> Any:
    """The object that `package.module:object` names.

    Raises:
        ValueError: there is no such module or object, or the text is not of that form.
        ImportError: the module cannot be imported, for a reason of its own.
    """
    if not is_reference(text):
        raise ValueError(f"cannot read {text!r}: write package.module:object")
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {error.name!r} for {text!r}; modules in the working directory and "
            "installed ones are found"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{text!r} names nothing: {module} has no {name}")
        found = getattr(found, part)
    return found
