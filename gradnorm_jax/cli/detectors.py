"""The command that lists the detectors."""

import dataclasses
import inspect
import json
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from gradnorm_jax.detectors import DETECTORS, parse_detectors
from gradnorm_jax.detectors.table import Row

_READS = {"logits": "logits", "outputs": "features, logits", "network": "the network"}


@dataclasses.dataclass(frozen=True)
class DetectorsOptions:
    """List the detectors: what they read, what they learn, their options and papers.

    Example: gradnorm-jax detectors --json

    Attributes:
        json: print JSON, for programs.
    """

    json: bool = False


def run_detectors(options: DetectorsOptions) -> None:
    """Prints the list."""
    records = [_describe(name, row) for name, row in DETECTORS.items()]
    if options.json:
        print(json.dumps(records, indent=2))
        return
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in ("Detector", "Space", "Reads", "Paper"):
        table.add_column(column, overflow="fold", no_wrap=column == "Detector")
    for record in records:
        reads = " + ".join([_READS[record["needs"]], *record["learns"]])
        table.add_row(_call(record), record["space"], reads, record["paper"])
    rich.console.Console(highlight=False).print(table)


def _call(record: dict[str, Any]) -> rich.text.Text:
    options = [
        f"{name}=..." if name in record["required"] else f"{name}={default}"
        for name, default in record["options"].items()
    ]
    return rich.text.Text.assemble((record["name"], "bold"), *(f"\n  {each}" for each in options))


def _describe(name: str, row: Row) -> dict[str, Any]:
    (detector,) = parse_detectors([row.build(**row.example)])
    parameters = inspect.signature(row.build).parameters.values()
    return {
        "name": name,
        "space": row.space,
        "needs": detector.needs,
        "learns": [each.name for each in detector.fit.statistics] if detector.fit else [],
        "options": {p.name: None if p.default is p.empty else p.default for p in parameters},
        "required": list(row.example),
        "paper": row.paper,
    }
