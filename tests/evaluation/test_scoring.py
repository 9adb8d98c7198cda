import dataclasses
import types

import jax
import numpy as np
import pytest

from gradnorm_jax.data.images import decode_rgb
from gradnorm_jax.data.preprocess import get_preprocess, scale
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.detectors import Detector, parse_detectors
from gradnorm_jax.evaluation.passes import Execution, fit_feed, fitting_mesh, score_feed
from gradnorm_jax.evaluation.scoring import image_feed
from gradnorm_jax.models import load_model
from gradnorm_jax.scores import feature_norm, gradnorm
from gradnorm_jax.sharding import batch_mesh
from gradnorm_jax.types import Head, Model

BIT32 = get_preprocess("bit32")
EVERY_KIND = parse_detectors(
    ["msp", "odin(epsilon=0.01)", "mahalanobis", "energy", "gradnorm", "gradnorm(autodiff=True)"]
)


@pytest.fixture(scope="module")
def setting(make_folder, weights):
    model = load_model("bit_tiny", weights)
    training = image_feed("fit", open_source(str(make_folder(30, classes=3, seed=1))), BIT32)
    fitted = fit_feed(model, training, EVERY_KIND, Execution())
    return model, fitted.states, open_source(str(make_folder(21, classes=3)))


def score(setting, detectors=EVERY_KIND, **options):
    model, states, source = setting
    feed = image_feed("ID", source, BIT32)
    return score_feed(model, states, feed, detectors, Execution(**options))


@pytest.mark.parametrize(
    ("batch_size", "devices", "devices_per_copy"),
    [(1, 1, 1), (7, 1, 1), (64, 8, 8), (4, 2, 1), (7, 8, 1)],
)
def test_scores_depend_on_neither_batch_size_nor_devices(
    setting, batch_size, devices, devices_per_copy
):
    expected = score(setting, batch_size=21, mesh=batch_mesh(jax.devices()[:1]))
    mesh = batch_mesh(jax.devices()[:devices], devices_per_copy=devices_per_copy)
    table = score(setting, batch_size=batch_size, mesh=mesh)
    assert table.ids == expected.ids == sorted(set(expected.ids))
    np.testing.assert_array_equal(table.labels, expected.labels)
    np.testing.assert_array_equal(table.predictions, expected.predictions)
    for name, values in expected.scores.items():
        np.testing.assert_allclose(table.scores[name], values, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(("gigabytes", "expected"), [(8, 1), (7, 2), (2, 4), (1, 8), (0.1, 8)])
def test_as_few_devices_share_a_copy_as_have_room_for_it(monkeypatch, gigabytes, expected):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": int(gigabytes * 2**30)})
    parameters = np.broadcast_to(np.float32(0), (4, 2**28))  # 4 GiB that are not there
    model = Model(jax.tree_util.Partial(len), {"kernel": parameters}, Head(("kernel",)))
    assert fitting_mesh(model).shape["copy"] == 1  # CPUs do not tell
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 8)
    assert fitting_mesh(model).shape["copy"] == expected
    assert fitting_mesh(model, 2).shape["copy"] == 2


def test_closed_form_is_the_definition_on_a_network(setting):
    # S = ||h|| ||p - u||, where the two take p from forward passes compiled by themselves: what
    # rounding makes of p is relative to 1, not to p - u.
    reach = Detector(
        "reach", "outputs", lambda state, model, batch: feature_norm(batch.outputs.features, ord=1)
    )
    scores = score(
        setting, (*parse_detectors(["gradnorm", "gradnorm(autodiff=True)"]), reach)
    ).scores
    error = np.abs(scores["gradnorm"] - scores["gradnorm(autodiff=True)"])
    assert (error / scores["reach"]).max() < 1e-6


def test_scores_are_those_of_each_image_alone(setting):
    model, _, source = setting
    table = score(setting, parse_detectors(["gradnorm"]))
    for i in (0, 20):
        pixels = BIT32.pixels(decode_rgb(source[i].data))[None]
        alone = gradnorm(*model(scale(pixels, BIT32)))
        np.testing.assert_allclose(table.scores["gradnorm"][i], alone[0], rtol=2e-5)


def test_undecodable_and_ignored_files_are_counted(setting, make_folder):
    folder = make_folder(5, seed=2)
    (folder / "001.png").write_text("not an image")
    (folder / "notes.txt").write_text("ignored")
    source = open_source(str(folder))
    table = score((*setting[:2], source), batch_size=2)
    assert table.ids == ["000.png", "002.png", "003.png", "004.png"]
    assert [file for file, _, _ in table.excluded] == ["notes.txt", "001.png"]
    assert len(table.scores["msp"]) == 4


@pytest.mark.parametrize("max_bad", [0.0, 0.2, 0.39, 0.41])
def test_too_many_undecodable_files_stop_the_run(setting, make_folder, max_bad):
    folder = make_folder(5, seed=4)
    for name in ("001.png", "003.png"):
        (folder / name).write_text("not an image")
    inputs = (*setting[:2], open_source(str(folder)))
    if max_bad > 0.2:  # rounded up: two of five
        assert len(score(inputs, batch_size=8, max_bad=max_bad).ids) == 3
        return
    limit = round(5 * max_bad)
    with pytest.raises(
        ValueError, match=rf"more than {limit} of the 5 images of ID .* 001\.png: .* \(--max-bad\)"
    ):
        score(inputs, batch_size=8, max_bad=max_bad)


def test_nothing_decodable(setting, make_folder):
    folder = make_folder(1, seed=3)
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of the 1 images of ID .*000\.png: the file is empty"
    ):
        score((*setting[:2], open_source(str(folder))))


def test_scores_that_are_not_finite_are_named(setting):
    broken = Detector(
        "broken", "outputs", lambda state, model, batch: batch.outputs.logits[:, 0] * np.nan
    )
    with pytest.raises(ValueError, match=r"broken gives scores .* 21 images .*class0/000\.png"):
        score(setting, (broken,))


def test_fit_is_the_same_for_any_batch_size(setting, make_folder):
    model = setting[0]
    feed = image_feed("fit", open_source(str(make_folder(30, classes=3, seed=1))), BIT32)
    states = [
        fit_feed(model, feed, EVERY_KIND, Execution(batch_size=size)).states["mahalanobis"]
        for size in (8, 40)
    ]
    np.testing.assert_allclose(states[0].centre, states[1].centre, rtol=1e-5)


def test_one_trace_for_a_whole_run(setting):
    calls = []

    def counted(state, model, batch):
        calls.append(1)
        return batch.outputs.logits[:, 0]

    score(setting, (Detector("counted", "outputs", counted),), batch_size=8)
    model = dataclasses.replace(setting[0], params=jax.tree.map(lambda x: x + 1, setting[0].params))
    assert len(calls) == 1
    detectors = (Detector("counted", "outputs", counted),)
    score((model, *setting[1:]), detectors, batch_size=8)
    score((setting[0], *setting[1:]), detectors, batch_size=8)
    assert len(calls) == 1
