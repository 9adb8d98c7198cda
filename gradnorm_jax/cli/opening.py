"""The options that say how a detector file is read."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from gradnorm_jax.calibration.calibrated import Calibrated
from gradnorm_jax.calibration.detector_file import load_detector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """What reading a detector file takes beside the file.

    Attributes:
        weights: of the model, if they are not where they were.
        preprocess: where the detector's has no name that its file could tell, `my_module:object`.
        trust: modules whose code may be run because the file names it, such as that of your
            function that makes the model.
    """

    weights: Path | None = None
    preprocess: str | None = None
    trust: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()

    def load(self, detector: Path) -> Calibrated:
        """The detector of a file; see `load_detector` for what is raised."""
        return load_detector(
            detector, weights=self.weights, preprocess=self.preprocess, trust=self.trust
        )


Opened = Annotated[Opening, tyro.conf.arg(name="")]
"""A field whose options are those of the command itself."""
