import numpy as np
import pytest

import gradnorm_jax as gj
from gradnorm_jax.detectors import compose, msp, react

RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": RNG.normal(size=(6, 3)).astype(np.float32),
    "bias": np.zeros(3, np.float32),
}
ID = RNG.normal(size=(60, 6)).astype(np.float32) + 1
FAR = 3 * RNG.normal(size=(40, 6)).astype(np.float32)
OPTIONS = {"batch_size": 20, "progress": False}


@pytest.fixture(scope="module")
def model():
    return gj.from_apply(lambda p, x: x @ p["kernel"] + p["bias"][None], PARAMS, ID[:2])


def test_the_best_of_the_grid(model):
    grid = {"k": [1, 5, 20]}
    sets = {"far": FAR, "near": FAR / 2}
    tuned = gj.tune("knn", model, id_data=ID, ood_validation=sets, grid=grid, fit=ID, **OPTIONS)
    assert [t.detector.name for t in tuned.trials] == ["knn(k=1)", "knn(k=5)", "knn(k=20)"]
    assert tuned.grid == grid
    names = [t.detector for t in tuned.trials]
    result = gj.evaluate(model, ID, sets, detectors=names, fit=ID, **OPTIONS)
    for trial in tuned.trials:
        aurocs = {name: result[trial.detector.name, name].auroc.value for name in sets}
        assert trial.aurocs == aurocs
        assert trial.auroc == pytest.approx(np.mean(list(aurocs.values())))
    best = max(tuned.trials, key=lambda t: t.auroc)
    assert tuned.detector == best.detector
    assert f"* {100 * best.auroc:6.2f}  {best.detector.name}" in str(tuned)


def test_a_function_of_several_options(model):
    tuned = gj.tune(
        lambda quantile, temperature: compose(
            react(quantile=quantile), msp(temperature=temperature)
        ),
        model,
        id_data=ID,
        ood_validation=FAR,
        grid={"quantile": [0.5, 0.8], "temperature": [2, 3]},
        fit=ID,
        **OPTIONS,
    )
    assert [t.detector.name for t in tuned.trials][1] == "react(quantile=0.5)+msp(temperature=3)"
    assert len(tuned.trials) == 4


def test_what_cannot_be_tried_is_said(model):
    data = {"id_data": ID, "ood_validation": FAR, **OPTIONS}
    with pytest.raises(ValueError, match="at least one value for each option"):
        gj.tune("knn", model, grid={"k": []}, **data)
    with pytest.raises(ValueError, match="has no option 'j'"):
        gj.tune("knn", model, grid={"j": [1]}, **data)
    with pytest.raises(ValueError, match="fitted to ID training data"):
        gj.tune("knn", model, grid={"k": [1]}, **data)
