"""Making prepared data sets: downloads, conversions, and any source of one's own."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.core.dataset_builders import adhoc_builder
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import py_utils, tqdm_utils

from gradnorm_jax.data.ood_builders import OODBuilder
from gradnorm_jax.data.source import Source
from gradnorm_jax.data.tfds_source import expand, find_prepared, formats, place, prepare_command
from gradnorm_jax.text import to_utf8

_ARRAY_RECORD = file_adapters.FileFormat.ARRAY_RECORD
_INFO = "dataset_info.json"
_HINTS = {"imagenet2012": "; to evaluate, ILSVRC2012_img_val.tar is enough"}


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
        name: what to write after `tfds:`.
        folder: where it is.
        images: how many each of its splits has.
        action: what was done: "prepared", "converted", or "found" for nothing.
    """

    name: str
    folder: str
    images: Mapping[str, int]
    action: str


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Makes a data set of tfds, or one of this package, readable without TensorFlow.

    One that is not there is downloaded and prepared as ArrayRecord. One that is there as TFRecord
    gets ArrayRecord files beside its own. One that is there as ArrayRecord is left as it is.

    Args:
        name: `NAME[/CONFIG]`: of tfds, `inaturalist_ood`, `sun_ood` or `places_ood`.
        data_dir: where data sets are; by default where tfds puts them, in TFDS_DATA_DIR or else
            ~/tensorflow_datasets.
        manual_dir: the folder with files that were downloaded by hand.

    Raises:
        ValueError: there is no such data set, files are missing in `manual_dir` or are not the
            right ones, or it is there in a format that cannot be converted.
        ImportError: tfds needs TensorFlow to prepare it.
        OSError: it cannot be downloaded, read or written.
    """
    builder = find_prepared(name, data_dir)
    if builder is None:
        return _download(name, data_dir, manual_dir)
    available = formats(builder)
    if "array_record" in available:
        return _describe(name, builder, "found")
    if "tfrecord" in available:
        _convert(builder)
        return _describe(name, builder, "converted")
    raise ValueError(
        f"{builder.info.full_name} is prepared as {', '.join(sorted(available))}, which cannot be "
        "converted: prepare it in another folder, by --data-dir FOLDER"
    )


def prepare_source(
    source: Source,
    name: str,
    *,
    split: str = "test",
    data_dir: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Makes a data set, as ArrayRecord, of the images of any source, without TensorFlow.

    A few large files are read far faster than many small ones, on shared and remote disks above
    all. The images are stored as they are, in the order of the source, with their ids and labels,
    so that `tfds:NAME` gives the same records as the source itself.

    Args:
        source: the images.
        name: of the new data set: small letters, digits and _.
        split: of the new data set; its only one.
        data_dir: where to put it; by default where tfds puts data sets.

    Raises:
        ValueError: the name is not of that form, or there is a data set of that name already.
        OSError: an image cannot be read, or the data set not written.
    """
    for what, word in {"data set": name, "split": split}.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", word):
            raise ValueError(
                f"{word!r} cannot be the name of a {what}: use small letters, digits and _"
            )
    existing = find_prepared(name, data_dir)
    if existing is not None:
        raise ValueError(
            f"there is a data set {name} in {existing.data_dir} already: choose another name, or "
            "delete it"
        )
    builder = _SourceBuilder(
        name=name,
        version="1.0.0",
        description=f"Images of {source.name}.",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.Scalar(np.int64),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={split: _examples(source)},
        data_dir=expand(data_dir),
        disable_shuffling=True,
    )
    builder.download_and_prepare(file_format=_ARRAY_RECORD)
    return _describe(name, builder, "prepared")


class _SourceBuilder(adhoc_builder.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
    """tfds's builder without a class of its own, spared its question for TensorFlow's types."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Any]:
        return self._split_datasets


def _examples(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(source)):
        record = source[index]
        yield index, {"image": record.data, "label": record.label, "file_name": to_utf8(record.id)}


def _download(
    name: str, data_dir: str | os.PathLike[str] | None, manual_dir: str | os.PathLike[str] | None
) -> Prepared:
    try:
        builder = tfds.builder(name, data_dir=expand(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"neither tfds nor this package has a data set {name!r}, and none is in "
            f"{place(data_dir)}"
        ) from error
    config = tfds.download.DownloadConfig(manual_dir=expand(manual_dir))
    try:
        if config.manual_dir:
            _check_manual(builder, config.manual_dir)
        with _few_retries():
            builder.download_and_prepare(file_format=_ARRAY_RECORD, download_config=config)
    except ImportError as error:
        if "tensorflow" not in str(error):
            raise
        raise ImportError(
            f"tfds needs TensorFlow to prepare {name}, though not to read it: "
            "pip install 'gradnorm-jax[tf]', or prepare image files by "
            f"{prepare_command(name, data_dir)} --from SOURCE"
        ) from error
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        raise OSError(_cannot_prepare(builder, error, name, data_dir)) from error
    return _describe(name, builder, "prepared")


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    # Ten, as tfds has it, take minutes to tell that there is no network. It takes no argument.
    before, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 3
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


def _check_manual(builder: tfds.core.DatasetBuilder, folder: str) -> None:
    # tfds passes over such a folder and downloads, if it can.
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    if isinstance(builder, OODBuilder) and not builder.find_by_hand(folder):
        raise FileNotFoundError(f"{folder} holds neither {builder.ARCHIVE} nor its folder")


def _cannot_prepare(
    builder: tfds.core.DatasetBuilder,
    error: Exception,
    name: str,
    data_dir: str | os.PathLike[str] | None,
) -> str:
    # tfds puts instructions after its own errors, and what it was doing before those of others.
    first = isinstance(error, AssertionError)
    reason = str(error).split(". " if first else "\n")[0 if first else -1]
    message = f"{name} cannot be prepared: {reason}"
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return message
    instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split()).rstrip(".")
    return (
        f"{message}; put into a folder what has to be downloaded by hand ({instructions}"
        f"{_HINTS.get(builder.name, '')}), and run {prepare_command(name, data_dir)} "
        "--manual-dir FOLDER"
    )


def _convert(builder: tfds.core.DatasetBuilder) -> None:
    """Writes ArrayRecord files beside TFRecord files; those that are there are not done again."""
    work = [
        (split.filename_template, {"shard_index": index, "num_shards": split.num_shards}, length)
        for split in builder.info.splits.values()
        for index, length in enumerate(split.shard_lengths)
    ]
    for template, shard, length in tqdm_utils.tqdm(work, desc="Converting", unit=" files"):
        target = template.replace(filetype_suffix="array_record").sharded_filepath(**shard)
        if not target.exists():
            records = _read_tfrecord(str(template.sharded_filepath(**shard)), length)
            with py_utils.incomplete_file(target) as unfinished:
                file_adapters.ArrayRecordFileAdapter.write_examples(unfinished, records)
    builder.info.add_alternative_file_format(_ARRAY_RECORD)
    # Renamed into place, so that a data set is never without its description.
    with tempfile.TemporaryDirectory(dir=builder.data_dir) as folder:
        builder.info.write_dataset_info_json(folder)
        Path(folder, _INFO).replace(Path(builder.data_dir, _INFO))


def _read_tfrecord(path: str, length: int) -> Iterator[tuple[int, bytes]]:
    # Without TensorFlow, and therefore without a look at the checksums of the records.
    count = 0
    try:
        for record in grain.experimental.TFRecordIterDataset(path):
            yield count, record
            count += 1
    except ValueError as error:
        raise OSError(f"{path} is not a TFRecord file, or is truncated: {error}") from error
    if count != length:
        raise OSError(f"{path} is truncated: it holds {count} records instead of {length}")


def _describe(name: str, builder: tfds.core.DatasetBuilder, action: str) -> Prepared:
    images = {str(split): info.num_examples for split, info in builder.info.splits.items()}
    return Prepared(name, builder.data_dir, images, action)
