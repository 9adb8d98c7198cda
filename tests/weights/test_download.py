"""Downloads, from a server on loopback."""

import hashlib
import logging
import socket
import threading

import pytest

from gradnorm_jax.weights import published
from gradnorm_jax.weights.download import fetch
from gradnorm_jax.weights.published import PUBLISHED, Published, cache_folder, download
from tests.weights.server import serve

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site():
    with serve(CONTENT) as site:
        yield site


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.npz"


def interrupt(site, path, after=300_000):
    site.stop_after = after
    with pytest.raises(
        OSError, match=rf"it stopped after {after} of {len(CONTENT)} bytes; try aga"
    ):
        fetch(f"{site.url}/file.npz", path, sha256=SHA256)
    site.stop_after = None
    assert not path.exists()


@pytest.mark.parametrize("name", ["file.npz", "moved.npz"])
def test_a_file_is_downloaded_once(site, path, name):
    for _ in range(2):
        assert fetch(f"{site.url}/{name}", path, sha256=SHA256[:8]) == path
    assert path.read_bytes() == CONTENT
    assert site.asked == [None]
    assert {each.name for each in path.parent.iterdir()} == {"file.npz", "file.npz.lock"}


def test_an_interrupted_download_is_continued(site, path):
    interrupt(site, path)
    fetch(f"{site.url}/file.npz", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-"]


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": '"2"'}, {"etag": None}])
def test_where_that_is_impossible_it_begins_anew(site, path, change):
    interrupt(site, path)
    for name, value in change.items():
        setattr(site, name, value)
    fetch(f"{site.url}/file.npz", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


def test_versions_are_never_mixed(site, path):
    interrupt(site, path)
    site.content, site.etag = CONTENT[::-1], '"2"'
    fetch(f"{site.url}/file.npz", path)
    assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_a_server_without_versions_is_asked_for_everything(site, path, etag):
    site.etag = etag
    interrupt(site, path)
    fetch(f"{site.url}/file.npz", path)
    assert site.asked == [None, None]
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_whole_already(site, path):
    interrupt(site, path)
    path.with_name("file.npz.part").write_bytes(CONTENT)
    fetch(f"{site.url}/file.npz", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT


def test_another_file_is_refused_and_not_kept(site, path):
    with pytest.raises(
        ValueError,
        match=rf"SHA-256 begins {SHA256[:16]} in place of 00000000, which is recorded; htt",
    ):
        fetch(f"{site.url}/file.npz", path, sha256="00000000")
    assert [each.name for each in path.parent.iterdir()] == ["file.npz.lock"]


def test_a_hash_that_is_not_recorded_is_noted(site, path, caplog):
    with caplog.at_level(logging.WARNING):
        fetch(f"{site.url}/file.npz", path)
    (record,) = caplog.records
    assert f"{SHA256} is noted in {path}.sha256" in record.message
    fetch(f"{site.url}/file.npz", path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"file\.npz is damaged .*; delete {path} to download"):
        fetch(f"{site.url}/file.npz", path)
    path.unlink()
    site.content = b"another version"
    with pytest.raises(ValueError, match=rf"which is noted in {path}.sha256; .* has changed, or"):
        fetch(f"{site.url}/file.npz", path)


def test_a_file_that_is_not_there(site, path):
    with pytest.raises(
        OSError, match=rf"404, Not Found; try again, .* or put the file at {path} b"
    ):
        fetch(f"{site.url}/nothing.npz", path)
    assert not path.exists()


def test_no_connection(path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.npz"
        with pytest.raises(
            OSError, match=rf"{url} cannot be downloaded: Connection refused; .*{path}"
        ):
            fetch(url, path)


def test_several_at_once_download_once(site, path):
    threads = [
        threading.Thread(target=fetch, args=(f"{site.url}/file.npz", path)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.asked == [None]
    assert path.read_bytes() == CONTENT


def test_progress_counts_mebibytes(site, path):
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        for item in items:
            yield item
            seen.append(len(item))

    fetch(f"{site.url}/file.npz", path, progress=track)
    assert seen == [("file.npz, MiB", 2), 2**20, len(CONTENT) - 2**20]


def test_published_weights_go_to_the_cache(site, tmp_path, monkeypatch):
    row = Published("file", "bit_tiny", f"{site.url}/file.npz", SHA256)
    monkeypatch.setattr(published, "PUBLISHED", {"file": row})
    monkeypatch.setenv("GRADNORM_JAX_CACHE", str(tmp_path))
    assert download("file") == tmp_path / "weights" / "file.npz"
    assert download("file", folder=tmp_path / "other").read_bytes() == CONTENT
    with pytest.raises(
        ValueError, match="called 'fyle'; did you mean file\\? `gradnorm-jax models`"
    ):
        download("fyle")


def test_where_the_cache_is(monkeypatch, tmp_path):
    for variable in ("GRADNORM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gradnorm_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "gradnorm_jax"


def test_hashes_are_those_in_the_names_of_published_files():
    assert all(name == row.name for name, row in PUBLISHED.items())
    files = {name: row.url.rpartition("/")[2] for name, row in PUBLISHED.items()}
    assert len(set(files.values())) == len(files)
    assert all(row.sha256 in files[name] for name, row in PUBLISHED.items())


def test_a_real_file_has_the_hash_that_is_in_its_name(shared_data):
    with open(shared_data / "weights" / "resnet20-12fca82f.th", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest.startswith(PUBLISHED["resnet20-12fca82f"].sha256)
