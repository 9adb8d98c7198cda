import threading

import jax
import numpy as np
import pytest

from gradnorm_jax.data import as_stream
from gradnorm_jax.data.images import decode_rgb
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import get_preprocess, scale
from gradnorm_jax.data.schedule import BatchSchedule
from gradnorm_jax.data.source_stream import Decoding, source_stream
from gradnorm_jax.detectors import Detector, parse_detectors
from gradnorm_jax.evaluation.in_memory import fit_states
from gradnorm_jax.evaluation.loop import Execution, Run, one_ahead, score_data
from gradnorm_jax.evaluation.step import place_model
from gradnorm_jax.models import load_model
from gradnorm_jax.scores import feature_norm, gradnorm
from gradnorm_jax.sharding import batch_mesh
from tests.data.files import ONE_PIXEL, MadeSource
from tests.evaluation import networks

BIT32 = get_preprocess("bit32")
EVERY_KIND = parse_detectors(
    ["msp", "odin(epsilon=0.01)", "mahalanobis", "energy", "gradnorm", "gradnorm(autodiff=True)"]
)


@pytest.fixture(scope="module")
def setting(make_folder, weights):
    model = load_model("bit_tiny", weights)
    training = make_folder(30, classes=3, seed=1)
    states = fit_states(model, training, EVERY_KIND, preprocess=BIT32)
    return model, states, open_source(str(make_folder(21, classes=3)))


def score(setting, detectors=EVERY_KIND, batch_size=24, devices=8, **options):
    model, states, source = setting
    placed, placement = place_model(model, batch_mesh(jax.devices()[:devices]))
    schedule = BatchSchedule(batch_size)
    execution = Execution(placement, schedule, BIT32, **options)
    stream = as_stream(source, BIT32)
    return score_data(Run(placed, execution), "ID", stream, states, detectors)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (64, 8), (4, 2)])
def test_scores_depend_on_neither_batch_size_nor_devices(setting, batch_size, devices):
    detectors = (*EVERY_KIND, Detector("reach", "outputs", reach))
    expected = score(setting, detectors, batch_size=21, devices=1)
    table = score(setting, detectors, batch_size=batch_size, devices=devices)
    assert table.ids == expected.ids == sorted(set(expected.ids))
    np.testing.assert_array_equal(table.labels, expected.labels)
    np.testing.assert_array_equal(table.predictions, expected.predictions)
    for name, values in expected.scores.items():
        # GradNorm is ||h|| ||p - u||, and what rounding makes of p is relative to 1, not to p - u.
        rounding = 1e-6 * expected.scores["reach"] if name.startswith("gradnorm") else 0
        excess = np.abs(table.scores[name] - values) - 2e-5 * np.abs(values) - rounding
        assert excess.max() <= 0, name


def reach(state, model, batch):
    return feature_norm(batch.outputs.features, ord=1)


def test_closed_form_is_the_definition_on_a_network(setting):
    # S = ||h|| ||p - u||, where the two take p from forward passes compiled by themselves: what
    # rounding makes of p is relative to 1, not to p - u.
    detectors = parse_detectors(["gradnorm", "gradnorm(autodiff=True)"])
    scores = score(setting, (*detectors, Detector("reach", "outputs", reach))).scores
    error = np.abs(scores["gradnorm"] - scores["gradnorm(autodiff=True)"])
    assert (error / scores["reach"]).max() < 1e-6


def test_scores_are_those_of_each_image_alone(setting):
    model, _, source = setting
    table = score(setting, parse_detectors(["gradnorm"]))
    for i in (0, 20):
        pixels = BIT32.pixels(decode_rgb(source[i].data))[None]
        alone = gradnorm(*model(scale(pixels, BIT32)))
        np.testing.assert_allclose(table.scores["gradnorm"][i], alone[0], rtol=2e-5)


CHEAP = parse_detectors(["msp"])


def test_undecodable_and_ignored_files_are_counted(setting, make_folder):
    folder = make_folder(5, seed=2)
    (folder / "001.png").write_text("not an image")
    (folder / "notes.txt").write_text("ignored")
    table = score((*setting[:2], open_source(str(folder))), CHEAP, batch_size=8)
    assert table.ids == ["000.png", "002.png", "003.png", "004.png"]
    assert [file for file, _, _ in table.excluded] == ["notes.txt", "001.png"]
    assert len(table.scores["msp"]) == 4


@pytest.mark.parametrize("max_undecodable", [0.0, 0.2, 0.39, 0.41])
def test_too_many_undecodable_files_stop_the_run(setting, make_folder, max_undecodable):
    folder = make_folder(5, seed=4)
    for name in ("001.png", "003.png"):
        (folder / name).write_text("not an image")
    changed = (*setting[:2], open_source(str(folder)))
    options = {"batch_size": 8, "max_undecodable": max_undecodable}
    if max_undecodable > 0.2:  # rounded up: two of five
        assert len(score(changed, CHEAP, **options).ids) == 3
        return
    limit = round(5 * max_undecodable)
    message = rf"more than {limit} of the 5 images of ID .* 001\.png: .* \(max_undecodable\)"
    with pytest.raises(ValueError, match=message):
        score(changed, CHEAP, **options)


def test_nothing_decodable(setting, make_folder):
    folder = make_folder(1, seed=3)
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the inputs of ID .*000\.png: the file is empty"):
        score((*setting[:2], open_source(str(folder))), CHEAP, max_undecodable=1.0)


def broken(state, model, batch):
    return batch.outputs.logits[:, 0] * np.float32(np.nan)


def test_scores_that_are_not_finite_are_named(setting):
    message = r"broken gives scores .* on ID, for 21 inputs of a batch \(class0/000\.png, "
    with pytest.raises(ValueError, match=message):
        score(setting, (Detector("broken", "logits", broken),))


def test_fit_is_the_same_for_any_batch_size(setting, make_folder):
    folder = make_folder(30, classes=3, seed=1)
    states = [
        fit_states(setting[0], folder, EVERY_KIND, preprocess=BIT32, batch_size=size)["mahalanobis"]
        for size in (8, 40)
    ]
    np.testing.assert_allclose(states[0].centre, states[1].centre, rtol=1e-5)


def test_one_trace_for_a_whole_run(setting):
    calls = []

    def counted(state, model, batch):
        calls.append(1)
        return batch.outputs.logits[:, 0]

    score(setting, (Detector("counted", "logits", counted),), batch_size=8)
    model = setting[0].replace(params=jax.tree.map(lambda x: x + 1, setting[0].params))
    assert len(calls) == 1
    for changed in (model, setting[0]):
        detectors = (Detector("counted", "logits", counted),)
        score((changed, *setting[1:]), detectors, batch_size=8)
    assert len(calls) == 1


def test_each_is_given_when_the_next_has_been_started():
    started = []

    def start():
        for i in range(3):
            started.append(i)
            yield i

    ahead = one_ahead(start())
    assert (next(ahead), started) == (0, [0, 1])
    assert (next(ahead), started) == (1, [0, 1, 2])
    assert list(ahead) == [2]


class Announcing:
    """Tells of each batch of 8 images that reading it has begun."""

    def __init__(self, batches):
        self._source = MadeSource(8 * batches)
        self.begun = [threading.Event() for _ in range(batches)]
        self.name, self.ignored, self.fingerprint = "announcing", (), self._source.fingerprint

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.begun[index // 8].set()
        return self._source[index]


def test_decoding_goes_on_while_a_batch_is_computed():
    """No batch is done before the next is being read: one after the other, that would never end."""
    source = Announcing(12)
    stream = source_stream(source, ONE_PIXEL, Decoding(workers=1))
    placed, placement = place_model(networks.build(3))

    def watch(batches, description, total):
        for batch in batches:
            following = source.begun[batch.number + 1 :][:1]
            assert all(begun.wait(timeout=60) for begun in following)
            yield batch

    execution = Execution(placement, BatchSchedule(8), ONE_PIXEL, track=watch)
    table = score_data(Run(placed, execution), "made", stream, {}, CHEAP)
    assert len(table.ids) == 96
