"""Detectors that run without this library decide as they do with it."""

import dataclasses
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax import cli
from gradnorm_jax.data.preprocess import scale
from gradnorm_jax.detectors import DETECTORS, parse_detectors
from gradnorm_jax.evaluation.in_memory import fit_states
from gradnorm_jax.sharding import batch_mesh, map_batch
from tests.documentation import code_of
from tests.evaluation import networks

TRAIN = (networks.images(120, seed=5), networks.labels(120))
NEW = networks.images(7, seed=2, shape=(6, 6, 3))


def apply(params, images):
    """A depthwise convolution before the layers of `networks`."""
    kernel = params["depthwise"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    images = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=3
    )
    return networks.apply(params, images)


def build():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 1, 3)).astype(np.float32)
    params = {"depthwise": kernel, **networks.make_params(6 * 6 * 3)}
    return gj.from_apply(apply, params, jnp.zeros((2, 6, 6, 3)))


@pytest.fixture(scope="module")
def model():
    return build()


def calibrated_between(detectors, model):
    """Detectors calibrated to scores between those of the new inputs, and what they decide."""
    fitted = tuple(d for d in detectors if d.fit)
    states = fit_states(model, TRAIN, fitted, preprocess=networks.PREPROCESS) if fitted else {}
    decide = jax.jit(lambda several: [each.decide(NEW) for each in several])

    def calibrated(detector, scores):
        known = gj.Fitted(detector, model, states.get(detector.name))
        return gj.Calibrated(known, scores, scores[1], 0.7, 0.95, False, networks.PREPROCESS)

    def between(decision):
        ascending = jnp.sort(decision.score)
        return (ascending[1:] + ascending[:-1]) / 2

    decisions = decide([calibrated(each, jnp.zeros(len(NEW) - 1)) for each in detectors])
    several = [calibrated(d, between(x)) for d, x in zip(detectors, decisions, strict=True)]
    return several, decide(several)


def read_again(exported):
    pytest.importorskip("flatbuffers")
    return jax.export.deserialize(bytes(exported.serialize()))


def assert_same(found, expected):
    scores, *decided = found
    assert scores.dtype == expected.score.dtype
    tolerance = 1e-4 * np.abs(expected.score).max(initial=0)
    np.testing.assert_allclose(scores, expected.score, rtol=1e-4, atol=tolerance)
    for new, old in zip(decided, expected[1:], strict=True):
        np.testing.assert_array_equal(new, old)
        assert new.dtype == old.dtype


@pytest.mark.slow
def test_all_detectors_decide_the_same(model):
    rows = [row.build(**row.example) for row in DETECTORS.values() if row.space != "inner"]
    composed = ["react+gradnorm", "gradnorm(select=all)", "gradnorm(select=body,ord=2)"]
    inner = ["adascale_a", "gaia_a", "pro", "nac_layers(layers=2)", "layer_norms"]
    detectors = parse_detectors([*rows, *composed, *inner])
    several, expected = calibrated_between(detectors, model)
    exported = [read_again(gj.export_detector(each)) for each in several]
    for each in exported:
        assert (*each.platforms, each.nr_devices) == ("cpu", "cuda", "tpu", 1)
    found = jax.jit(lambda images: [each.call(images) for each in exported])(NEW)
    for each, decision in zip(found, expected, strict=True):
        assert_same(each, decision)


@pytest.fixture(scope="module")
def energy(model):
    (calibrated,), (expected,) = calibrated_between(parse_detectors(["energy"]), model)
    return calibrated, expected


def test_batches_of_any_size_and_both_types(energy):
    calibrated, expected = energy
    exported = read_again(gj.export_detector(calibrated))
    for count in (0, 1, 7):
        assert_same(exported.call(NEW[:count]), gj.Decision(*(x[:count] for x in expected)))
    floats = np.asarray(scale(NEW, networks.PREPROCESS))
    with pytest.raises(ValueError, match=r"Dtype mismatch.*expected uint8"):
        exported.call(floats)
    assert_same(read_again(gj.export_detector(calibrated, floats)).call(floats), expected)


def test_an_artefact_says_what_it_is(energy):
    exported = gj.export_detector(energy[0])
    assert exported.fun_name == (
        f"energy of {networks.PREPROCESS.name} images, by gradnorm-jax {gj.__version__}, "
        f"jax {jax.__version__}, jaxlib {version('jaxlib')}"
    )


@pytest.fixture
def exported_file(energy, tmp_path, monkeypatch, capsys):
    """Makes the working directory one with an exported detector; what the command prints."""
    pytest.importorskip("flatbuffers")
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", NEW)
    gj.save_detector(energy[0], "energy.safetensors", model=f"{__name__}:build")
    cli.main(["export", "energy.safetensors", "-o", "detector.jaxexport", "--trust", __name__])
    return capsys.readouterr().out


ALONE = """
import sys
from importlib.metadata import version

import numpy as np

sys.modules.update(dict.fromkeys(["gradnorm_jax", "flax"{others}]))  # none can be imported
images = np.load("images.npy")
{code}
np.savez("decision.npz", *(np.asarray(x) for x in (score, p_value, is_ood, prediction)))
"""


def decisions_of_a_process(code, others=""):
    """Of a process that has nothing of ours."""
    line = [sys.executable, "-c", ALONE.format(code=code, others=others)]
    subprocess.run(line, check=True)
    return np.load("decision.npz").values()


def snippet(word):
    """The code on the page on serving in which this stands."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "serving.md"
    (code,) = (block for block in code_of(page) if word in block)
    return code


def test_it_runs_without_this_library(energy, exported_file):
    said = r"uint8 \[B, 6, 6, 3\] on cpu, cuda, tpu, [1-9]\d* kB\nexported: detector.jax"
    assert re.search(said, exported_file)
    assert_same(decisions_of_a_process(snippet("detector.call(images)")), energy[1])


@pytest.mark.slow
def test_it_becomes_a_saved_model(energy, exported_file):
    pytest.importorskip("tensorflow")
    if jax.__version_info__ >= (0, 12):
        pytest.skip("TensorFlow 2.21 does not read programs of JAX 0.12")
    subprocess.run([sys.executable, "-c", snippet("saved_model")], check=True)
    code = """
import tensorflow as tf

decide = tf.saved_model.load("saved_model").decide
assert decide(images[:0])[0].shape == (0,)
score, p_value, is_ood, prediction = decide(images)
"""
    assert_same(decisions_of_a_process(code, others=', "jax"'), energy[1])


def test_what_cannot_be_exported(energy):
    calibrated, _ = energy

    def exported(function, inputs=None, preprocess=networks.PREPROCESS):
        model = gj.Model(jax.tree_util.Partial(function), calibrated.fitted.model.variables, None)
        fitted = gj.Fitted(calibrated.fitted.detector, model, None)
        changed = dataclasses.replace(calibrated, fitted=fitted, preprocess=preprocess)
        return gj.export_detector(changed, inputs)

    def calls_back(variables, images):
        shape = jax.ShapeDtypeStruct((len(images), 3), jnp.float32)
        return gj.Outputs(None, jax.pure_callback(lambda x: x[:, 0, 0], shape, images))

    def on_two_devices(variables, images):
        mesh = batch_mesh(jax.devices()[:2])
        mapped = map_batch(lambda shared, x: x.sum((1, 2)), mesh)
        return gj.Outputs(None, mapped(None, jnp.tile(images, (2, 1, 1, 1)))[:1])

    with pytest.raises(ValueError, match="platforms must be of cpu, cuda, rocm, tpu, got"):
        gj.export_detector(calibrated, platforms=["gpu"])
    with pytest.raises(ValueError, match="has no Preprocess that would tell the shape"):
        exported(calls_back, preprocess=None)
    with pytest.raises(ValueError, match="energy cannot be exported with this model: "):
        exported(calls_back)
    with pytest.raises(ValueError, match=r"energy cannot be exported .* mesh"):
        exported(on_two_devices)


def test_what_the_command_refuses(energy, tmp_path, monkeypatch):
    path, out = tmp_path / "energy.safetensors", tmp_path / "detector.jaxexport"
    line = ["export", str(path), "-o", str(out), "--trust", __name__]
    without = dataclasses.replace(energy[0], preprocess=None)
    gj.save_detector(without, path, model=f"{__name__}:build")
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "flatbuffers", None)
        with pytest.raises(SystemExit, match="exported detectors need flatbuffers, which is not"):
            cli.main(line)
    pytest.importorskip("flatbuffers")
    with pytest.raises(SystemExit, match=r"has no Preprocess that would tell .* export it in Pyth"):
        cli.main(line)
    assert not out.exists()
