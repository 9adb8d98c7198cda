"""Data sets prepared by TensorFlow Datasets (tfds), read without decoding.

ArrayRecord, which has random access, is read without TensorFlow; TFRecord with it.
"""

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants, file_adapters, read_only_builder

from gradnorm_jax.data.source import Record, hash_records
from gradnorm_jax.data.stream import UNKNOWN
from gradnorm_jax.data.tfrecord import TFRecords, require_tensorflow

_SPEC = re.compile(r"(?P<name>[^:]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?")
# The paper's Textures are the whole of it.
_DEFAULT_SPLITS = {"dtd": "all"}
_ID_FEATURES = ("file_name", "filename", "id", "image_id")


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """The images of a prepared data set; a `Source`.

    Attributes:
        name: that of the data set, for messages and results.
        records: the serialized examples.
        features: of each example, those that are read.
        keys: which feature is the `image`, and which the `label` and the `id` if there are any.
        parts: split, first and last position + 1 of each run of examples that make up the source.
        facts: what tfds has noted of it: version, features, and of the split of each part the
            number of bytes, and of examples in each file. They are the same in all file formats.
        ignored: nothing; a data set holds only images.
        spec: what `open_source` takes to open it again.
    """

    name: str
    records: grain.sources.RandomAccessDataSource[bytes] = dataclasses.field(repr=False)
    features: tfds.features.FeaturesDict = dataclasses.field(repr=False)
    keys: Mapping[str, str]
    parts: Sequence[tuple[str, int, int]]
    facts: Sequence[Any] = dataclasses.field(repr=False)
    ignored: Sequence[str] = ()
    spec: str | None = None

    def __len__(self) -> int:
        """The number of images."""
        return sum(stop - start for _, start, stop in self.parts)

    def __getitem__(self, index: int) -> Record:
        """Reads the example at position `index`; OSError if that fails."""
        index = range(len(self))[index]
        try:
            raw = self.records[index]
        except RuntimeError as error:
            # What ArrayRecord raises for a file that is corrupt or gone.
            raise OSError(
                f"image {index} of the data set {self.name} cannot be read; delete the data set "
                f"and prepare it again: {error}"
            ) from error
        skip_decoding = {self.keys["image"]: tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example_np(raw, decoders=skip_decoding)
        return Record(
            id=self._id(example, index),
            label=int(example[self.keys["label"]]) if "label" in self.keys else UNKNOWN,
            data=example[self.keys["image"]],
        )

    def fingerprint(self) -> str:
        """A hash of what tfds has noted of the data, and of the first and the last 32 images.

        It is cheap, few files are read, and does not see a change that leaves all of these alone.
        """
        ends = sorted({*range(len(self))[:32], *range(len(self))[-32:]})
        return hash_records([self.facts, self.parts], map(self.__getitem__, ends))

    def _id(self, example: Mapping[str, Any], index: int) -> str:
        if "id" in self.keys:
            value = example[self.keys["id"]]
            return value.decode() if isinstance(value, bytes) else str(value)
        part = 0
        while index >= (length := self.parts[part][2] - self.parts[part][1]):
            index -= length
            part += 1
        split, start, _ = self.parts[part]
        return f"{split}[{start + index}]"


def tfds_source(spec: str, data_dir: str | os.PathLike[str] | None = None) -> PreparedSource:
    """Opens a prepared data set.

    Images are the bytes that were stored when it was prepared, so that decoding and preprocessing
    are the same as for files. They are its feature `image`, or its only one of that kind. Labels
    are its feature `label` if it is a class number; where it is -1, or missing, they are unknown.
    Ids are its feature `file_name`, `filename`, `id` or `image_id`, as they are, or else the
    position in the split, `validation[7]`. Should they repeat, positions tell the images apart.

    Args:
        spec: `NAME[/CONFIG][:VERSION][:SPLIT]`. The split is in tfds's notation: `validation`,
            several added up as in `train+test`, `all`, a slice as in `validation[:1000]`. It may be
            left out where there is only one, and for `dtd`, which stands for all of it: the 5,640
            images that the paper calls Textures. Without a version the latest one is taken.
        data_dir: where data sets are; by default where tfds puts them, in TFDS_DATA_DIR or else
            ~/tensorflow_datasets.

    Raises:
        ValueError: the name or the split is wrong, it is not clear which feature is the image, or
            the files are in another format.
        FileNotFoundError: the data set is not prepared.
        ImportError: it is prepared as TFRecord, and TensorFlow is not installed.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"cannot read tfds:{spec}: write tfds:NAME[/CONFIG][:SPLIT]")
    name = match["name"]
    builder = find_prepared(name, data_dir)
    if builder is None:
        raise FileNotFoundError(
            f"the data set {name} is not prepared in {place(data_dir)}: if it is elsewhere, give "
            "that folder as --data-dir or TFDS_DATA_DIR, or else run "
            f"{prepare_command(name, data_dir)}"
        )
    split = match["split"] or _default_split(builder)
    try:
        parts = _parts(builder, split)
    except ValueError as error:
        raise ValueError(
            f"cannot read the split {split!r} of {name}, which has {_splits(builder)}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    keys = _keys(builder)
    info = builder.info
    features = tfds.features.FeaturesDict({key: info.features[key] for key in keys.values()})
    splits = [info.splits[name] for name, _, _ in parts]
    return PreparedSource(
        name=builder.name + (f"-{builder.builder_config.name}" if "/" in name else ""),
        records=_records(builder, split, name, data_dir),
        features=features,
        keys=keys,
        parts=parts,
        facts=(
            info.full_name,
            features.to_json(),
            [(each.num_bytes, each.shard_lengths) for each in splits],
        ),
        spec=f"tfds:{spec}",
    )


def find_prepared(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder | None:
    """The data set `NAME[/CONFIG][:VERSION]`, from its files alone, or None if there are none.

    Raises:
        ValueError: that is no name of a data set, or it lies in several places.
    """
    if not re.fullmatch(r"\w+(/[\w.\-]+)?(:\d+\.\d+\.\d+)?", name):
        raise ValueError(
            f"{name!r} cannot be the name of a data set: write NAME, of letters, digits and _, or "
            "NAME/CONFIG for one of several configurations"
        )
    try:
        return read_only_builder.builder_from_files(name, data_dir=expand(data_dir))
    except tfds.core.DatasetNotFoundError:
        return None


def formats(builder: tfds.core.DatasetBuilder) -> set[str]:
    """The file formats that a data set is prepared in: "array_record", "tfrecord", ..."""
    return {file_format.value for file_format in builder.info.available_file_formats()}


def expand(path: str | os.PathLike[str] | None) -> str | None:
    """A path, or address, with its `~` replaced."""
    return None if path is None else os.path.expanduser(path)


def place(data_dir: str | os.PathLike[str] | None) -> str:
    """Where data sets are looked for, for messages."""
    return os.fspath(data_dir or constants.DATA_DIR)


def prepare_command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """The command line that prepares a data set."""
    where = f" --data-dir {shlex.quote(os.fspath(data_dir))}" if data_dir else ""
    return f"gradnorm-jax data prepare {name}{where}"


def _records(
    builder: tfds.core.DatasetBuilder,
    split: str,
    name: str,
    data_dir: str | os.PathLike[str] | None,
) -> grain.sources.RandomAccessDataSource[bytes]:
    available = formats(builder)
    if "array_record" in available:
        return builder.as_data_source(
            split,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format=file_adapters.FileFormat.ARRAY_RECORD,
        )
    if "tfrecord" in available:
        require_tensorflow(
            f"{builder.info.full_name} is prepared as TFRecord, which only TensorFlow reads",
            f"convert it to ArrayRecord once: {prepare_command(name, data_dir)}",
        )
        files = builder.info.splits[split].file_instructions
        return TFRecords(tuple((file.filename, file.skip, file.take) for file in files))
    raise ValueError(
        f"{builder.info.full_name} is prepared as {', '.join(sorted(available))}, which is not "
        "read: prepare it as ArrayRecord in another folder, by "
        f"{prepare_command(name, None)} --data-dir FOLDER"
    )


def _parts(builder: tfds.core.DatasetBuilder, split: str) -> tuple[tuple[str, int, int], ...]:
    splits = builder.info.splits
    parts = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits):
        stop = splits[part.splitname].num_examples if part.to is None else part.to
        start = part.from_ or 0
        if start >= stop:
            raise ValueError(f"{part.splitname}[{start}:{stop}] holds no image")
        parts.append((part.splitname, start, stop))
    for (name, _, stop), (other, start, _) in itertools.pairwise(sorted(parts)):
        if name == other and start < stop:
            raise ValueError(f"{name}[{start}] is in it more than once")
    return tuple(parts)


def _default_split(builder: tfds.core.DatasetBuilder) -> str:
    splits = tuple(builder.info.splits)
    if builder.name in _DEFAULT_SPLITS or len(splits) == 1:
        return _DEFAULT_SPLITS.get(builder.name, splits[0])
    raise ValueError(
        f"the data set {builder.name} has the splits {_splits(builder)}: choose, as in "
        f"tfds:{builder.name}:{splits[0]} or tfds:{builder.name}:{'+'.join(splits)}"
    )


def _splits(builder: tfds.core.DatasetBuilder) -> str:
    return ", ".join(f"{name} ({info.num_examples})" for name, info in builder.info.splits.items())


def _keys(builder: tfds.core.DatasetBuilder) -> dict[str, str]:
    features = dict(builder.info.features.items())
    # Images of floats are stored as if they had four colours.
    images = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image) and np.dtype(feature.np_dtype).kind == "u"
    ]
    if "image" not in images and len(images) != 1:
        raise ValueError(
            f"cannot tell which feature of {builder.info.full_name} is the image: none is called "
            f"'image', and {', '.join(images) or 'none'} of {', '.join(features)} are images"
        )
    keys = {"image": "image" if "image" in images else images[0]}
    label: Any = features.get("label")
    is_scalar = isinstance(label, tfds.features.Tensor) and not label.shape
    if is_scalar and np.dtype(label.np_dtype).kind in "iu":
        keys["label"] = "label"
    ids = [key for key in _ID_FEATURES if key in features]
    return keys | ({"id": ids[0]} if ids else {})
