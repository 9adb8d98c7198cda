"""TFRecord files, read by TensorFlow."""

import bisect
import dataclasses
import functools
import importlib.util
import itertools
import threading
from collections.abc import Sequence
from typing import Any

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TFRecords:
    """The records of TFRecord files, one after the other; a sequence of bytes.

    The format has no index, so a file is read as a whole when one of its records is asked for, and
    the last two are kept in memory. That suits reading in order; tfds's files have about 100 MB.
    Where several hosts, or worker processes, share the records, each reads every file: for them
    rather convert the data set to ArrayRecord, by `gradnorm-jax data prepare NAME`.

    Attributes:
        files: the path of each file, how many of its first records to skip, and how many to take.
    """

    files: Sequence[tuple[str, int, int]]

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(take for _, _, take in self.files))

    def __len__(self) -> int:
        """The number of records."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        """Record `index`, at least 0; OSError if its file cannot be read."""
        number = bisect.bisect_right(self._ends, index)
        path, skip, take = self.files[number]
        # Threads that need the same file wait for the one that is reading it.
        with _lock:
            records = _read(path)
        if len(records) < skip + take:
            raise OSError(f"{path} holds only {len(records)} records: delete it and prepare again")
        return records[skip + take - (self._ends[number] - index)]


def require_tensorflow(reason: str, instead: str) -> None:
    """ImportError with the reason, and what can be done instead, if there is no TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(f"{reason}: pip install 'gradnorm-jax[tf]', or {instead}")


@functools.lru_cache(maxsize=2)
def _read(path: str) -> tuple[bytes, ...]:
    tensorflow = _tensorflow()
    try:
        return tuple(tensorflow.data.TFRecordDataset(path).as_numpy_iterator())
    except tensorflow.errors.OpError as error:
        raise OSError(f"{path} cannot be read: {error.message}") from error


@functools.cache
def _tensorflow() -> Any:
    import tensorflow

    # It would take the whole memory of every GPU that it sees.
    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow
