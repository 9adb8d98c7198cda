"""Where PyTorch's state dictionaries hold the variables of networks that carry their names."""

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.tree import Path

_NAMES = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}


def torch_layout(path: Path, linear: str | None) -> CheckpointEntry:
    """Where a state dictionary holds the variable at `path`: `a/0/kernel` is its `a.0.weight`.

    Args:
        path: of a variable in a network of convolutions, or of a statistic of its batches.
        linear: the one module whose kernel is a matrix, if there is one: `fc`.
    """
    *scopes, name = map(str, path)
    module = ".".join(scopes)
    key = f"{module}.{_NAMES.get(name, name)}"
    if name != "kernel":
        return CheckpointEntry(key)
    return CheckpointEntry(key, axes=(1, 0) if module == linear else (2, 3, 1, 0))
