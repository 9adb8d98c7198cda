"""Where BiT's PyTorch files hold its parameters."""

from gradnorm_jax.models.checkpoint import CheckpointEntry
from gradnorm_jax.tree import Path


def layout(path: Path, last_norm: str) -> CheckpointEntry:
    """Where a state dictionary holds the parameter at `path`.

    Args:
        path: of a parameter of `bit.BiT`.
        last_norm: the name of the last normalisation: `head.gn` in BiT's own code, and
            `before_head.gn` in that of the GradNorm paper, whose checkpoint is
            `BiT-S-R101x1-flat-finetune.pth.tar`.
    """
    *scopes, name = map(str, path)
    match scopes:
        case ["root_block", _]:
            module = "root.conv"
        case ["group_norm"]:
            module = last_norm
        case ["head", _]:
            module = "head.conv"
        case [block, unit, _, "proj", _]:
            module = f"body.{block}.{unit}.downsample"
        case [block, unit, layer, kind]:
            short = "gn" if kind == "group_norm" else "conv"
            module = f"body.{block}.{unit}.{short}{'abc'.index(layer) + 1}"
    if name == "kernel":
        return CheckpointEntry(f"{module}.weight", axes=(2, 3, 1, 0))
    return CheckpointEntry(f"{module}.{'weight' if name == 'scale' else name}")
