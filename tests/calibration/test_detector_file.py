"""Detectors that are written and read again, and files that are not to be trusted."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax.calibration import file_content, probe
from gradnorm_jax.calibration.state_layout import from_layout, to_layout
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.detectors import DETECTORS, parse_detectors
from gradnorm_jax.evaluation.run_config import describe_preprocess
from gradnorm_jax.models import init_model, save_weights
from gradnorm_jax.statistics import Examples
from gradnorm_jax.types import linear_head
from tests.evaluation import networks

HELD_OUT, NEW = networks.inputs(40, seed=1), networks.inputs(8, seed=2)
TRAIN = (networks.inputs(50, seed=5), networks.labels(50))

ALL = [row.build(**row.example) for row in DETECTORS.values()]


def build():
    return networks.build()


def norm(state, model, batch, *, scale):
    return -scale * jnp.linalg.norm(batch.outputs.logits, axis=-1)


def own(scale: float = 1.0):
    return gj.Detector("own", "logits", norm, options={"scale": scale})


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Calibrated detectors and their files."""
    root = tmp_path_factory.mktemp("detectors")
    made = {}
    for spec in ("gradnorm(ord=2)", "mahalanobis"):
        calibrated = gj.calibrate(spec, model, HELD_OUT, fit=TRAIN)
        path = root / f"{spec[:4]}.safetensors"
        gj.save_detector(calibrated, path, model=f"{__name__}:build")
        made[spec] = calibrated, path
    return made


@pytest.mark.parametrize("spec", ["gradnorm(ord=2)", "mahalanobis"])
def test_what_is_read_decides_as_what_was_written(files, model, spec):
    calibrated, path = files[spec]
    decide = jax.jit(gj.Calibrated.decide)
    expected = decide(calibrated, NEW)
    compiled = decide._cache_size()
    decide(gj.load_detector(path, model), NEW)
    assert decide._cache_size() == compiled
    for loaded in (gj.load_detector(path, model), gj.load_detector(path, trust=[__name__])):
        for new, old in zip(decide(loaded, NEW), expected, strict=True):
            np.testing.assert_array_equal(new, old)
        assert loaded.tpr_interval == calibrated.tpr_interval
    before = path.read_bytes()
    gj.save_detector(loaded, path, model=f"{__name__}:build")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "specs",
    [
        ["dice+mahalanobis", "vim", "kl_matching"],
        pytest.param(
            # Inner ones learn from the network, and have tests of their own.
            [row.build(**row.example) for row in DETECTORS.values() if row.space != "inner"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "all"],
)
def test_what_detectors_learn_can_be_laid_out(model, specs):
    features, logits = map(np.asarray, model(TRAIN[0]))
    examples = Examples(features, logits, TRAIN[1], np.arange(50))
    for detector in parse_detectors(specs):
        if detector.fit is None:
            continue
        state = detector.fit.state(linear_head(model), examples)
        layout, arrays = to_layout(state)
        read = from_layout(json.loads(json.dumps(layout)), arrays, pytest.fail)
        assert jax.tree.structure(read) == jax.tree.structure(state), detector.name
        jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(jnp.asarray, state))


@pytest.mark.parametrize("held", [False, True])
def test_known_networks_with_and_without_their_weights(tmp_path, held):
    weights = tmp_path / "weights.npz"
    network = init_model("bit_tiny", 3, jax.random.key(0))
    save_weights(network.params, "bit_tiny", weights)
    calibrated = gj.calibrate(
        "msp", network, networks.images(24, shape=(32, 32, 3)), preprocess="bit32"
    )
    path = tmp_path / "detector.safetensors"
    gj.save_detector(calibrated, path, model="bit_tiny", weights=weights, with_weights=held)
    if held:
        weights.unlink()
    loaded = gj.load_detector(path)
    new = networks.images(4, seed=1, shape=(32, 32, 3))
    np.testing.assert_allclose(loaded.score(new), calibrated.score(new), rtol=1e-6)
    assert loaded.preprocess == calibrated.preprocess
    other = tmp_path / "other.npz"
    save_weights(init_model("bit_tiny", 3, jax.random.key(1)).params, "bit_tiny", other)
    with pytest.raises(ValueError, match="arrays are others than those that the detector was cal"):
        gj.load_detector(path, weights=other)


def test_detectors_of_ones_own_go_by_their_reference(model, tmp_path):
    path = tmp_path / "own.safetensors"
    with pytest.raises(ValueError, match=r"'own' cannot be made again from its name: .*a text"):
        gj.save_detector(gj.calibrate(own(), model, HELD_OUT), path)
    spec = f"{__name__}:own(scale=2)"
    calibrated = gj.calibrate(spec, model, HELD_OUT)
    gj.save_detector(calibrated, path)
    with pytest.raises(ValueError, match=r"names code in the module .*, or trust=\['"):
        gj.load_detector(path, model)
    loaded = gj.load_detector(path, model, trust=[__name__])
    np.testing.assert_array_equal(loaded.score(NEW), calibrated.score(NEW))
    with pytest.raises(ValueError, match="does not tell how its model is made: give the model"):
        gj.load_detector(path, trust=[__name__])


def test_another_preprocessing_is_refused(model, tmp_path):
    path = tmp_path / "detector.safetensors"
    held_out = networks.images(30)
    gj.save_detector(
        gj.calibrate("msp", model, held_out, preprocess="squash=6,mean=half,std=half"), path
    )
    assert gj.load_detector(path, model).preprocess == networks.PREPROCESS
    with pytest.raises(ValueError, match=r"was calibrated with the preprocessing .*'size': 6"):
        gj.load_detector(path, model, preprocess="bit32")
    forge(path, preprocess="bit32", preprocess_facts=described("bit32"))
    with pytest.raises(ValueError, match="msp cannot score with what the file holds"):
        gj.load_detector(path, model)


def test_another_function_of_the_same_arrays_is_refused(tmp_path):
    path = tmp_path / "detector.safetensors"
    preprocess, params = networks.PREPROCESS, networks.make_params(6 * 6 * 3)

    def build(apply):
        return gj.from_apply(apply, params, jnp.zeros((2, 6, 6, 3)))

    def slightly_other(params, images):
        return networks.apply(params, images * (1 + 1e-6))

    def other(params, images):
        return networks.apply(params, jnp.flip(images, axis=3))

    calibrated = gj.calibrate(
        "energy", build(networks.apply), networks.images(30), preprocess=preprocess
    )
    gj.save_detector(calibrated, path)
    compiled = probe._score._cache_size()
    gj.load_detector(path, build(networks.apply))
    assert probe._score._cache_size() == compiled  # its program is the same
    gj.load_detector(path, build(slightly_other))
    with pytest.raises(ValueError, match="its function is another: two images are scored"):
        gj.load_detector(path, build(other))
    for forged in ({"program": "a"}, {"program": "a", "scores": [1.0]}):
        forge(path, probe=forged)
        with pytest.raises(ValueError, match="that it was tried on is not whole"):
            gj.load_detector(path, build(networks.apply))


def described(spec):
    return describe_preprocess(get_preprocess(spec))


def forge(path, arrays=(), **facts):
    """Changes a file as someone would who knows how files are made."""
    old, kept = file_content.decode_file(path)
    path.write_bytes(file_content.encode_file({**old, **facts}, {**kept, **dict(arrays)}))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"detector": "os:system(command=exit)"}, "names code in the module 'os'"),
        ({"detector": "all"}, "'all' is more than one detector"),
        ({"detector": "nonsense"}, "unknown detector 'nonsense'"),
        ({"detector": "gradnorm"}, "is not laid out|does not hold what gradnorm learns"),
        ({"detector": "vim"}, "vim cannot score with what the file holds"),
        ({"model": "subprocess:getoutput"}, "names code in the module 'subprocess'"),
        ({"model": "gradnorm_jax.__main__:main"}, "names code in the module 'gradnorm_jax.__main"),
        ({"model": "nonsense"}, "no architecture 'nonsense'"),
        ({"model_sha256": "0"}, "arrays are others than those"),
        ({"state": {"namedtuple": {}, "class": "os:stat_result"}}, "code in the module 'os'"),
        (
            {"state": {"namedtuple": {}, "class": "gradnorm_jax.fitted:fit"}},
            "gradnorm_jax.fitted:fit is no NamedTuple",
        ),
        (
            {"state": {"namedtuple": {"a": "0"}, "class": "gradnorm_jax.scores.feature:TiedGau"}},
            "names nothing",
        ),
        (
            {"state": {"namedtuple": {}, "class": "gradnorm_jax.scores.feature:TiedGaussians"}},
            "TiedGaussians has other fields",
        ),
        ({"state": None}, "3 arrays have no place in what the detector has learned"),
        ({"state": {"tuple": ["0", "0", "1"]}}, "not laid out as it should be"),
        ({"state": {"dict": {"a": "0", "b": "1", "c": "2"}}}, "mahalanobis cannot score with what"),
        ({"threshold": 1e9}, "its threshold 1000000000.0 is not that of its scores"),
        ({"tpr": 2.0}, "tpr must be above 0 and below 1"),
        ({"version": 1}, "is not a whole detector file: it is of version 1, and this reads 2"),
        ({"tpr": 1}, "its tpr is a int"),
        ({"confident": 1}, "its confident is a int"),
        ({"more": 1}, "its header tells other things than it should"),
        ({"preprocess": "os:x"}, "names code in the module 'os'"),
        ({"preprocess": "bit32"}, "calibrated with the preprocessing None, not"),
    ],
)
def test_forged_files_are_refused(files, model, tmp_path, facts, message):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(files["mahalanobis"][1].read_bytes())
    forge(path, **facts)
    given = None if "model" in facts else model
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        gj.load_detector(path, given)
    assert "subprocess" in before or "subprocess" not in sys.modules


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("calibration_scores", np.ones((2, 2), np.float32), "not \\[n\\] finite numbers"),
        ("calibration_scores", np.arange(40.0)[::-1], "not \\[n\\] finite numbers"),
        ("calibration_scores", np.full(40, np.nan), "not \\[n\\] finite numbers"),
        ("calibration_scores", np.arange(3.0, dtype=np.float32), "3 calibration scores are too f"),
        ("state/0", np.ones((7,), np.float32), "mahalanobis cannot score with what the file hol"),
        ("state/9", np.ones((7,), np.float32), "1 arrays have no place"),
    ],
)
def test_forged_arrays_are_refused(files, model, tmp_path, name, array, message):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(files["mahalanobis"][1].read_bytes())
    forge(path, {name: array})
    with pytest.raises(ValueError, match=message):
        gj.load_detector(path, model)


def test_damaged_files_are_refused(files, model, tmp_path):
    path = tmp_path / "damaged.safetensors"
    content = files["mahalanobis"][1].read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"\0" * 8, content[:-1], content + b"\0", content[: len(content) // 2]]
    for place in rng.integers(len(content), size=40):
        damaged.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(ValueError, match=r"damaged.safetensors is not a whole detector file"):
            gj.load_detector(path, model)
    with pytest.raises(FileNotFoundError, match="there is no detector file"):
        gj.load_detector(tmp_path / "nothing.safetensors", model)
    with pytest.raises(ValueError, match=r"detectors are written as \.safetensors"):
        gj.save_detector(files["mahalanobis"][0], tmp_path / "detector.pickle")


def test_state_that_cannot_be_laid_out():
    for state in ({1: np.ones(2)}, {"a": object()}, [jax.random.key(0)]):
        with pytest.raises(ValueError, match="files hold arrays in dicts"):
            to_layout(state)
