"""The command that prepares data sets."""

import contextlib
import dataclasses
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from gradnorm_jax.data.open_source import open_source


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Prepare a data set for `tfds:NAME`: download it, convert it, or make it of your own images.

    Example: gradnorm-jax data prepare my_flowers --from flowers --data-dir tfds

    Attributes:
        name: of tfds, or inaturalist_ood, sun_ood or places_ood; with --from, of your choice.
        source: make the data set of these images: a folder, csv:FILE or list:FILE.
        data_dir: where data sets are; by default where tfds puts them.
        manual_dir: the folder with files that were downloaded by hand.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    data_dir: str | Path | None = None
    manual_dir: str | Path | None = None


def run_prepare(options: PrepareOptions) -> str:
    """Prepares a data set and says what is where; see `gradnorm_jax.data.tfds_prepare`."""
    from gradnorm_jax.data.tfds_prepare import prepare, prepare_source  # slow to import

    # It warns of every try to reach a server, before the error that says it all.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with _tfds_kept_off_stdout():
        if options.source is None:
            done = prepare(options.name, data_dir=options.data_dir, manual_dir=options.manual_dir)
        else:
            source = open_source(options.source, options.data_dir)
            done = prepare_source(source, options.name, data_dir=options.data_dir)
    splits = ", ".join(f"{split}: {count} images" for split, count in done.images.items())
    return f"{done.action}: tfds:{done.name} in {done.folder} ({splits})"


@contextlib.contextmanager
def _tfds_kept_off_stdout() -> Iterator[None]:
    """What tfds tells of its progress goes to a terminal, or nowhere."""
    import tensorflow_datasets as tfds

    shown = sys.stderr.isatty()
    if not shown:
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr if shown else io.StringIO()):
        yield
