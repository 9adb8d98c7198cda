"""The out-of-distribution sets of Huang and Li for ImageNet, as tfds builders.

10,000 images each of iNaturalist, SUN and Places, chosen by hand so that no class of ImageNet is
among them ("MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR
2021); with Textures, tfds's `dtd`, they are the four sets of the GradNorm paper. Importing this
module makes tfds know `inaturalist_ood`, `sun_ood` and `places_ood`. None needs TensorFlow.
"""

import gzip
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from gradnorm_jax.data.folder_source import folder_source, is_image

ADDRESS = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/"
"""Where the authors' repository, deeplearning-wisc/gradnorm_ood, says that the archives are."""


class OODBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the three sets share; tfds asks for classes.

    The archive is taken from the manual folder, if it is there, or downloaded. Its size and SHA-256
    are recorded when it is first used, in `checksums.tsv` in the folder of the data set, and have
    to be the same ever after. In place of the archive, the manual folder may hold it unpacked.
    """

    VERSION = tfds.core.Version("1.0.0")
    ARCHIVE: str
    IMAGES = 10_000

    @classmethod
    def find_by_hand(cls, folder: str | os.PathLike[str]) -> Path | None:
        """The archive in a manual folder, or what it unpacks to; None if neither is there."""
        choices = (Path(folder, cls.ARCHIVE), Path(folder, cls.ARCHIVE.removesuffix(".tar.gz")))
        return next((path for path in choices if path.exists()), None)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__} No class is in ImageNet-1k; there are no labels.",
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
            ),
            homepage="https://github.com/deeplearning-wisc/gradnorm_ood",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        try:
            found = self.find_by_hand(dl_manager.manual_dir)
        except AssertionError:
            found = None  # There is no manual folder, or nothing is in it.
        if found and found.is_dir():
            images = self._all(_read_folder(found))
        else:
            url = ADDRESS + self.ARCHIVE
            archive = found or _download(dl_manager, url)
            record = self.data_dir_root / self.name / "checksums.tsv"
            images = _checked(self._all(_read_archive(archive)), archive, url, record)
        return {"test": self._generate_examples(images)}

    def _generate_examples(
        self, images: Iterator[tuple[str, bytes]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for file, data in images:
            yield file, {"image": data, "file_name": file}

    def _all(self, images: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """The images themselves; ValueError after the last if there are too few or too many."""
        count = 0
        for image in images:
            yield image
            count += 1
        if count != self.IMAGES:
            raise ValueError(
                f"{self.name} has {self.IMAGES} images, but {count} were found: get "
                f"{self.ARCHIVE} again"
            )


def _download(dl_manager: tfds.download.DownloadManager, url: str) -> Path:
    # By itself tfds does not give up for minutes where nothing answers.
    urllib.request.urlopen(url, timeout=10).close()
    return Path(dl_manager.download(url))


def _manual_download(archive: str) -> str:
    return f"{archive}, or the folder that it unpacks to, from {ADDRESS}{archive}"


class InaturalistOod(OODBuilder):
    """10,000 photographs of plants from iNaturalist, chosen by Huang and Li."""

    ARCHIVE = "iNaturalist.tar.gz"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _manual_download(ARCHIVE)


class SunOod(OODBuilder):
    """10,000 photographs of scenes from SUN, chosen by Huang and Li."""

    ARCHIVE = "SUN.tar.gz"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _manual_download(ARCHIVE)


class PlacesOod(OODBuilder):
    """10,000 photographs of scenes from Places365, chosen by Huang and Li."""

    ARCHIVE = "Places.tar.gz"
    MANUAL_DOWNLOAD_INSTRUCTIONS = _manual_download(ARCHIVE)


def _checked(
    images: Iterator[tuple[str, bytes]], archive: Path, url: str, record: tfds.core.Path
) -> Iterator[tuple[str, bytes]]:
    """The images of an archive; ValueError first if its checksum is not the one recorded."""
    found = checksums.compute_url_info(archive)
    known = checksums.load_url_infos(record) if record.exists() else {}
    expected = known.get(url, found)
    if found != expected:
        raise ValueError(
            f"{archive} is not the file that was used before: its SHA-256 is {found.checksum} "
            f"instead of {expected.checksum}; get it again, or delete {record} if you trust it"
        )
    yield from images
    # Only now is it known to be complete.
    record.parent.mkdir(parents=True, exist_ok=True)
    checksums.save_url_infos(record, {url: found})


def _read_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path, without the folder that everything is in, and contents of each image."""
    try:
        with _decompress(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                file = "/".join(PurePosixPath(member.name).parts[1:])
                contents = members.extractfile(member) if member.isfile() else None
                if contents and is_image(file):
                    yield file, contents.read()
            # Tar files that are cut may look complete; gzip notices at the end.
            while stream.read(2**20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged or incomplete: get it again ({error})") from error


def _decompress(archive: Path) -> BinaryIO:
    """The tar file in an archive, which may be one itself whatever its name says."""
    with archive.open("rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(archive)) if is_compressed else archive.open("rb")


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    source = folder_source(folder)
    for index in range(len(source)):
        record = source[index]
        yield record.id, record.data
