"""The out-of-distribution sets of Huang and Li for ImageNet, as tfds builders.

10,000 images each of iNaturalist, SUN and Places, chosen by hand so that no class of ImageNet is
among them ("MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR
2021); with Textures, tfds's `dtd`, they are the four sets of the GradNorm paper. Importing this
module makes tfds know `inaturalist_ood`, `sun_ood` and `places_ood`. None needs TensorFlow.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from gradnorm_jax.data.files import folder_source, is_image

ADDRESS = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/"
"""Where the authors' repository, deeplearning-wisc/gradnorm_ood, says that the archives are."""


class OODBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the three sets share; tfds asks for classes.

    The archive is taken from the manual folder, if it is there, or downloaded. Its size and SHA-256
    are recorded when it is first seen, in `checksums.tsv` in the folder of the data set, and have
    to be the same ever after. In place of the archive, the manual folder may hold it unpacked.
    """

    VERSION = tfds.core.Version("1.0.0")
    ARCHIVE: str
    IMAGES = 10_000

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
            manual = Path(dl_manager.manual_dir)
        except AssertionError:
            manual = None  # There is none, or nothing is in it.
        folder = self.ARCHIVE.removesuffix(".tar.gz")
        if manual and (manual / folder).is_dir() and not (manual / self.ARCHIVE).exists():
            images = _read_folder(manual / folder)
        else:
            url = ADDRESS + self.ARCHIVE
            if manual and (manual / self.ARCHIVE).exists():
                archive = manual / self.ARCHIVE
            else:
                archive = Path(dl_manager.download(url))
            record = Path(self.data_dir_root, self.name, "checksums.tsv")
            images = _read_checked(archive, url, record)
        return {"test": self._generate_examples(images)}

    def _generate_examples(
        self, images: Iterator[tuple[str, bytes]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        count = 0
        for file, data in images:
            yield file, {"image": data, "file_name": file}
            count += 1
        if count != self.IMAGES:
            raise ValueError(
                f"{self.name} has {self.IMAGES} images, but {count} were found: get "
                f"{self.ARCHIVE} again"
            )


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


def _read_checked(archive: Path, url: str, record: Path) -> Iterator[tuple[str, bytes]]:
    """The images of an archive, provided that it is the one whose checksum is recorded."""
    found = checksums.compute_url_info(archive)
    known = checksums.load_url_infos(record) if record.exists() else {}
    expected = known.get(url, found)
    if found != expected:
        raise ValueError(
            f"{archive} is not the file that was used before: its SHA-256 is {found.checksum} "
            f"instead of {expected.checksum}; get it again, or delete {record} if you trust it"
        )
    yield from _read_archive(archive)
    # Now it is known to be complete.
    record.parent.mkdir(parents=True, exist_ok=True)
    checksums.save_url_infos(record, {url: found})


def _read_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path, without the folder that everything is in, and contents of each image."""
    try:
        with tarfile.open(archive, "r|*") as members:
            for member in members:
                file = "/".join(PurePosixPath(member.name).parts[1:])
                if is_image(file) and (contents := members.extractfile(member)):
                    yield file, contents.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged or incomplete: get it again ({error})") from error


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    source = folder_source(folder)
    for index in range(len(source)):
        record = source[index]
        yield record.id, record.data
