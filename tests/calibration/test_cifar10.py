"""Real images: what is promised on half of CIFAR-10's test images holds on the other half."""

import io

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from scipy import stats

import gradnorm_jax as gj
from gradnorm_jax.calibration import init_drift, update_drift
from gradnorm_jax.calibration.conformal import threshold_rank
from tests import resnet20

pytestmark = pytest.mark.slow


def test_half_of_the_test_images_keep_what_the_other_half_promise(shared_data):
    model, preprocess = resnet20.build(shared_data / "weights" / "resnet20-12fca82f.th")
    files = sorted((shared_data / "cifar" / "cifar10_test").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    images = np.random.default_rng(0).permutation(images)
    held_out, new = images[:5000], images[5000:]
    scenes = sorted((shared_data / "imagenet" / "ood_scenes").iterdir())
    near = pyarrow.parquet.read_table(shared_data / "cifar" / "cifar100_test.parquet")["image"]
    shifts = {
        "scenes": np.stack([read(file) for file in scenes]),
        "CIFAR-100": np.stack([read(io.BytesIO(row)) for row in near[:500].to_pylist()]),
    }
    for detector in ("gradnorm", "energy"):
        calibrated = gj.calibrate(
            detector, model, held_out, preprocess=preprocess, batch_size=256, confident=True
        )
        decide = jax.jit(gj.Calibrated.decide)
        decisions = [decide(calibrated, block) for block in np.split(new, 20)]
        tpr = 1 - np.mean([each.is_ood for each in decisions])
        # The number that passes is beta-binomial, whatever the network.
        rank = threshold_rank(5000, 0.95, 0.95)
        low, high = stats.betabinom(5000, 5001 - rank, rank).interval(0.999)
        assert low <= 5000 * tpr <= high, detector
        p_values = np.concatenate([each.p_value for each in decisions])
        uniform = np.arange(1, 5002) / 5001
        assert stats.ks_2samp(p_values, uniform, method="asymp").pvalue > 1e-3, detector
        print(detector, tpr, calibrated.tpr_interval)

        scores = np.concatenate([each.score for each in decisions])
        state, drift = update_drift(init_drift(calibrated.calibration_scores), scores)
        assert drift.p_value[-1] > 0.01
        print("5000 new images:", drift.p_value[-1])
        for before in (0, 1000, 5000):
            state, _ = update_drift(init_drift(calibrated.calibration_scores), scores[:before])
            for name, shifted in shifts.items():
                _, drift = update_drift(state, calibrated.score(shifted))
                assert drift.p_value[-1] <= 0.01
                print(name, "after", before, "found at", (drift.p_value <= 0.01).argmax() + 1)


def read(file):
    return np.asarray(Image.open(file).convert("RGB").resize((32, 32), Image.BILINEAR))
