"""The commands about networks: which there are, and weights from elsewhere for them."""

import dataclasses
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import rich.box
import rich.console
import rich.table
import tyro

from gradnorm_jax.models import MODELS, PUBLISHED, Architecture, convert, get_architecture
from gradnorm_jax.models.architecture import FLAX
from gradnorm_jax.models.named import find_weights
from gradnorm_jax.tree import get_leaf

_NUMBERS = ("image_size", "classes", "features", "parameters")
_HEADERS = {"image_size": "pixels", "trained_on": "trained on"}


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Convert weights from anywhere into a file that needs no other framework to be read.

    Example: gradnorm-jax convert resnet50.pth --model resnet50 --out resnet50.safetensors

    Attributes:
        source: a PyTorch state dict (.pth, .pt, .th, .tar; needs the extra torch), .safetensors,
            .npz or .msgpack file, a folder of Orbax, or the name of published weights.
        model: whose weights these are; `gradnorm-jax models` lists the networks.
        out: the file to be written, .safetensors or .npz.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    model: str
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]


@dataclasses.dataclass(frozen=True)
class ModelsOptions:
    """List the networks known by name, and the weights that are published for them.

    Example: gradnorm-jax models 'resnet*' --json

    Attributes:
        names: of networks, or patterns such as 'resnet*'; by default all.
        json: print JSON in place of a table.
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME...")] = ()
    json: bool = False


def run_convert(options: ConvertOptions) -> str:
    """Converts weights and says what was written; see `gradnorm_jax.models.convert`."""
    source, _ = find_weights(options.source, options.model)
    model = convert(source, options.model, options.out)
    architecture = get_architecture(options.model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    num_classes = get_leaf(model.params, architecture.classifier_path).shape[-1]
    return (
        f"converted: {options.out} ({architecture.name}, {num_classes} classes, {parameters:,} "
        f"parameters, layout {architecture.layouts[0].name})"
    )


def run_models(options: ModelsOptions) -> None:
    """Prints the table of networks."""
    rows = [_row(each) for each in MODELS.values() if _is_asked_for(each.name, options.names)]
    if not rows:
        get_architecture(options.names[0])  # says what there is
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    console = rich.console.Console()
    for table in _tables(rows):
        console.print(table)


def _is_asked_for(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _row(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": architecture.name,
        "image_size": architecture.image_size,
        "preprocess": architecture.preprocess,
        "classes": architecture.num_classes,
        "features": architecture.size.features,
        "parameters": architecture.size.parameters,
        "layouts": [layout.name for layout in (*architecture.layouts, FLAX)],
        "source": architecture.source,
        "license": architecture.license,
        "weights": [
            dataclasses.asdict(row) for row in PUBLISHED.values() if row.model == architecture.name
        ],
    }


def _tables(rows: Sequence[dict[str, Any]]) -> list[rich.table.Table]:
    """What the rows say, in tables narrow enough for a terminal."""
    weights = [each for row in rows for each in row["weights"]]
    tables = {
        "Networks": (rows, ("name", *_NUMBERS, "license")),
        "Their images and weights files": (rows, ("name", "preprocess", "layouts", "source")),
        "Weights to download": (weights, ("name", "model", "trained_on")),
    }
    return [_table(title, rows, keys) for title, (rows, keys) in tables.items() if rows]


def _table(title: str, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for key in keys:
        table.add_column(
            _HEADERS.get(key, key),
            justify="right" if key in _NUMBERS else "left",
            no_wrap=key == "name" or key in _NUMBERS,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(_show(row[key]) for key in keys))
    return table


def _show(value: Any) -> str:
    match value:
        case None:
            return "-"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(value)
    return str(value)
