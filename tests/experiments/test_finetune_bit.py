"""The fine-tuning recipe on a network and images small enough for tests."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import finetune_bit, runs, training
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.models import get_architecture, load_model


@pytest.fixture
def options(make_folder, weights, tmp_path):
    folder = str(make_folder(40, classes=4))
    return finetune_bit.Options(
        train=folder,
        test=folder,
        num_classes=4,
        model="bit_tiny",
        weights=weights,
        ood=(f"same={folder}",),
        detectors=("gradnorm",),
        out=tmp_path / "run",
        steps=6,
        warm_up=2,
        batch_size=16,
        resize=36,
        crop=32,
        evaluate_every=2,
    )


def test_the_schedule_is_that_of_bit_hyperrule(options):
    paper = dataclasses.replace(options, steps=20_000, warm_up=500, batch_size=512)
    rate = finetune_bit.make_schedule(paper)
    expected = {0: 0, 250: 0.0015, 500: 0.003, 5_999: 0.003, 6_001: 3e-4, 11_999: 3e-4}
    expected |= {12_001: 3e-5, 17_999: 3e-5, 18_001: 3e-6, 19_999: 3e-6}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-12)
    half = finetune_bit.make_schedule(dataclasses.replace(paper, batch_size=256))
    np.testing.assert_allclose(half(500), 0.0015, rtol=1e-5)


def test_it_begins_with_the_weights_and_a_last_layer_of_zeros(options, weights):
    architecture = get_architecture("bit_tiny")
    params = finetune_bit.init_variables(options, architecture)["params"]
    loaded = load_model("bit_tiny", weights).params  # for three classes
    assert params["head"]["conv2d"]["kernel"].shape[-1] == 4
    assert not any(map(np.any, jax.tree.leaves(params["head"])))
    jax.tree.map(np.testing.assert_array_equal, params["block1"], loaded["block1"])


def test_batches_from_any_step_on_are_those_of_the_whole(options):
    source = open_source(options.train)
    preprocess = finetune_bit.squash(get_architecture("bit_tiny"), 36)

    def read(*steps):
        return list(finetune_bit.read_batches(source, preprocess, options, range(*steps)))

    whole, rest = read(6), read(3, 6)
    assert len(whole) == 6
    for mine, theirs in zip(rest, whole[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    # 96 images are two epochs of 40 and some: none comes a third time before all came twice.
    pixels = np.concatenate([batch[0] for batch in whole]).reshape(96, -1)
    counts = np.unique(pixels[:80], axis=0, return_counts=True)[1]
    assert len(counts) == 40
    assert set(counts) == {2}
    assert not np.array_equal(pixels[:40], pixels[40:80])


def test_labels_beyond_the_classes_are_refused(options):
    few = dataclasses.replace(options, num_classes=3)
    preprocess = finetune_bit.squash(get_architecture("bit_tiny"), 36)
    batches = finetune_bit.read_batches(open_source(few.train), preprocess, few, range(6))
    with pytest.raises(ValueError, match=r"has label 3; labels must be 0 to 2 \(--num-classes\)"):
        list(batches)


@pytest.fixture
def standard_promotion():
    """Optax's schedules mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_that_ends_early_resumes_to_the_same_bits(options, monkeypatch):
    whole = finetune_bit.train(options)
    history = runs.read_history(options.out)
    assert [line["round"] for line in history] == [1, 2, 3]
    assert "gradnorm/same/auroc" in history[0]

    evaluate, calls = training.ood_metrics, []

    def ends_at_the_second(result):
        calls.append(result)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(result)

    other = dataclasses.replace(options, out=options.out.with_name("other"))
    monkeypatch.setattr(training, "ood_metrics", ends_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        finetune_bit.train(other)
    again = finetune_bit.train(other)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    assert runs.read_history(other.out) == history
