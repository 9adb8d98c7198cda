"""The main job on real weights and images."""

import jax
import numpy as np
import pytest

from gradnorm_jax.data.folder_source import FileSource
from gradnorm_jax.data.open_source import open_source
from gradnorm_jax.data.preprocess import get_preprocess
from gradnorm_jax.evaluation.evaluate import evaluate
from gradnorm_jax.models import load_model
from gradnorm_jax.sharding import batch_mesh

pytestmark = pytest.mark.slow
CROP224 = get_preprocess("crop224")


@pytest.fixture(scope="module")
def model(shared_data):
    return load_model("mobilenet_v2", shared_data / "weights" / "mobilenet_v2_1.0_224.npz")


def some(source, step):
    """Every `step`-th image."""
    return FileSource(source.name, source.root, source.ids[::step], source.labels[::step])


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (64, 1), (64, 2), (64, 8)])
def test_autodiff_and_closed_form_agree_on_every_image(shared_data, model, batch_size, devices):
    source = some(open_source(f"csv:{shared_data}/imagenet/id_val.csv"), 20)
    detectors = ["gradnorm", "gradnorm(autodiff=True)"]
    table = evaluate(
        model,
        source,
        {"same": source},
        detectors=detectors,
        preprocess=CROP224,
        batch_size=batch_size,
        mesh=batch_mesh(jax.devices()[:devices]),
    ).tables["ID"]
    assert table.ids == list(source.ids)
    np.testing.assert_allclose(
        table.scores["gradnorm"], table.scores["gradnorm(autodiff=True)"], rtol=1e-6
    )


def test_what_an_independent_implementation_found(shared_data, model):
    folder = shared_data / "imagenet"
    evaluation = evaluate(
        model,
        some(open_source(f"csv:{folder}/id_val.csv"), 4),
        {
            name: some(open_source(str(folder / f"ood_{name}")), 4)
            for name in ("textures", "scenes")
        },
        detectors=["energy", "gradnorm"],
        preprocess=CROP224,
        label_offset=1,
    )
    assert 0.72 < evaluation.accuracy < 0.85
    for name in ("textures", "scenes"):
        energy, gradnorm = (evaluation.metrics[d][name].auroc.value for d in ("energy", "gradnorm"))
        assert energy > gradnorm + 0.04
        assert gradnorm > 0.75
