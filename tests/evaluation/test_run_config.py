import json
import os

import jax
import pytest

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.evaluation.run_config import claim_folder, claimed, describe_run, find_differences
from gradnorm_jax.evaluation.storage import open_folder
from tests.evaluation import networks

CONFIG = {"model": "m", "sets": ["a"], "data": {"ID": {"inputs": 3}}, "versions": {}}


def describe(model, *, detectors=(), preprocess=None, **facts):
    stream = as_stream(networks.inputs(3))
    return describe_run(model, {"ID": stream}, detectors, preprocess, facts)


def test_a_folder_is_claimed_by_one_run(tmp_path):
    folder = open_folder(tmp_path)
    claim_folder(folder, CONFIG)
    claim_folder(folder, CONFIG)
    other = CONFIG | {"model": "n", "sets": ["a", "b"], "data": {"ID": {"inputs": 4}}}
    with pytest.raises(
        FileExistsError,
        match=r"holds another run: model is 'm' there and 'n' now, sets is \['a'\] there and "
        r"\['a', 'b'\] now, data.ID.inputs is 3 there and 4 now; run its own command again to "
        "resume it, or choose another --out",
    ):
        claim_folder(folder, other)
    assert json.loads(folder.read("config.json")) == CONFIG


def test_foreign_files_are_left_alone(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("thesis.tex", b"")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        claim_folder(folder, CONFIG)
    assert folder.names() == ["thesis.tex"]


@pytest.mark.parametrize(("processes", "left"), [(1, []), (2, ["config.json"])])
def test_a_run_that_came_to_nothing_leaves_nothing_that_may_be_anothers(tmp_path, processes, left):
    folder = open_folder(tmp_path)
    with pytest.raises(ZeroDivisionError), claimed(folder, CONFIG | {"processes": processes}):
        raise ZeroDivisionError
    assert folder.names() == left


def test_differences():
    assert find_differences(CONFIG, CONFIG | {"sets": ("a",)}) == ""
    more = CONFIG | {"weights": 1}
    assert find_differences(CONFIG, more) == "weights is None there and 1 now"
    assert find_differences(more, CONFIG) == "weights is 1 there and missing now"
    many = find_differences(CONFIG, CONFIG | dict.fromkeys("abcd", 1))
    assert many.endswith("c is None there and 1 now, ...")


def test_versions_and_devices_are_told():
    told = describe(networks.build())
    assert told["devices"] == {"cpu": 8}
    assert set(told["versions"]) >= {"python", "jax", "flax", "numpy", "gradnorm-jax"}
    assert len(told["weights_sha256"]) == 64
    assert find_differences(told, told | {"devices": {"cpu": 1}}) == (
        "devices.cpu is 8 there and 1 now"
    )


def test_models_are_known_by_their_arrays():
    hashes = [describe(networks.build(seed=seed))["weights_sha256"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    model = networks.build()
    on_host = model.replace(params=jax.device_get(model.params))
    assert describe(on_host)["weights_sha256"] == hashes[0]


def test_sources_are_told_apart(make_folder):
    folder = make_folder(70, classes=2, seed=5)

    def told():
        return as_stream(open_source(str(folder)), networks.PREPROCESS).identity()

    first = told()
    assert first["inputs"] == 70
    assert first == told()
    path = folder / "class1" / "037.png"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes((folder / "class1" / "001.png").read_bytes())
    assert told() != first
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert told() == first
    (folder / "class0" / "068.png").rename(folder / "class1" / "068.png")
    assert told() != first
