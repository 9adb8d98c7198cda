"""Numbers that are not finite: in parameters, inputs, features, logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.evaluation.evaluate import evaluate
from gradnorm_jax.fitted import fit
from gradnorm_jax.tree import replace_leaf
from gradnorm_jax.types import Head, Model, Outputs, Variables
from tests.evaluation import networks
from tests.evaluation.networks import inputs, labels


@pytest.fixture(scope="module")
def model():
    return networks.build()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_named(model, tmp_path, bad):
    body = np.array(model.params["body"])
    body[3, 2] = bad
    spoilt = model.replace(params=replace_leaf(model.params, ("body",), body))
    with pytest.raises(ValueError, match="numbers that are not finite: body; training has diver"):
        evaluate(spoilt, inputs(9), {"far": inputs(5)}, detectors=["msp"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="not finite: body"):
        fit("mahalanobis", spoilt, (inputs(9), labels(9)))


def test_other_arrays_may_be_infinite_but_not_nan(model):
    def with_mask(mask):
        variables = Variables(model.params, {"mask": np.array([0, mask], np.float32)})
        return Model(model.function, variables, model.head)

    evaluate(with_mask(-np.inf), inputs(9), {"far": inputs(5)}, detectors=["msp"])
    with pytest.raises(ValueError, match="not finite: mask"):
        evaluate(with_mask(np.nan), inputs(9), {"far": inputs(5)}, detectors=["msp"])


@pytest.mark.parametrize("in_folder", [False, True])
def test_inputs_that_are_not_finite_are_named(model, tmp_path, in_folder):
    far = inputs(5)
    far[3, 1] = np.nan
    out = tmp_path / "out" if in_folder else None
    with pytest.raises(
        ValueError, match=r"input, features or logits are not finite on far, .*\(3\)"
    ):
        evaluate(model, inputs(9), {"far": far}, detectors=["msp"], out=out)


def large_features(variables, x):
    """Features that overflow where the logits do not."""
    return Outputs(x * jnp.float32(1e38), jnp.tanh(x @ variables.params["kernel"]))


def test_features_are_seen_by_detectors_that_do_not_read_them():
    x = np.array([[1.0, 2.0], [9.0, 1.0]], np.float32)
    variables = Variables({"kernel": np.ones((2, 3), np.float32)})
    model = Model(jax.tree_util.Partial(large_features), variables, Head(("kernel",)))
    with pytest.raises(ValueError, match=r"not finite on ID, for 1 inputs of a batch \(1\)"):
        evaluate(model, x, {"far": x}, detectors=["msp"])
