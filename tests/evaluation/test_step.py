import functools

import jax
import numpy as np

from gradnorm_jax.detectors import Batch, parse_detectors, take_passes
from gradnorm_jax.evaluation.in_memory import fit_states
from gradnorm_jax.evaluation.step import Placement, place_model, score_batch
from gradnorm_jax.sharding import batch_mesh
from tests.evaluation import networks


def test_placement_of_parameters():
    model = networks.build()
    placed, placement = place_model(model)
    assert placement == Placement(batch_mesh())
    assert placed.params["body"].sharding.is_fully_replicated
    assert len(placed.params["body"].sharding.device_set) == 8
    _, two = place_model(model, batch_mesh(jax.devices()[:2]))
    assert two.mesh.size == 2
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    params = model.params | {"body": jax.device_put(model.params["body"], spread)}
    kept, placement = place_model(model.replace(params=params))
    assert kept.params["body"].sharding == spread
    assert placement == Placement(mesh, params_are_split=True)


def test_detectors_share_their_passes_through_the_network():
    model, images = networks.build(), networks.inputs(5)
    groups = ["gradnorm(select=body)", "gradnorm(select=[head, b*])", "gradnorm(select=all)"]
    readings = ["layer_norms(ord=1)+knn(k=1)", "layer_norms(ord=1)+mahalanobis"]
    together = parse_detectors([*groups, "gradnorm", *readings])
    fitted = [d for d in together if d.fit]
    train = networks.inputs(30, seed=1), networks.labels(30)
    states = fit_states(model, train, fitted, batch_size=30, progress=False)
    placement = Placement(batch_mesh(jax.devices()[:1]))

    def step(detectors):
        return functools.partial(
            score_batch, detectors=tuple(detectors), preprocess=None, placement=placement
        )

    def engine_runs(detectors):
        program = jax.make_jaxpr(step(detectors))(model, states, images)
        return str(program).count("name=reduced_gradients")

    assert engine_runs(together) == 1
    assert engine_runs(parse_detectors([*groups, "gradnorm(select=body,ord=2)"])) == 2
    assert engine_runs(parse_detectors(["gradnorm"])) == 0
    found = step(together)(model, states, images).scores
    for alone in (together[0], together[-2]):
        assert engine_runs([alone]) == 1
        expected = step([alone])(model, states, images).scores[alone.name]
        np.testing.assert_allclose(found[alone.name], expected, rtol=1e-5)


def test_a_shared_pass_reads_no_more_than_is_selected():
    model, images = networks.build(), networks.inputs(5)
    detectors = parse_detectors(["gradnorm(select=head/bias)", "gradnorm(select=*/kernel)"])
    batch = take_passes(detectors, model, Batch(images, model(images)))
    ((_, norms),) = batch.passes
    assert norms.keys() == {"head/bias", "head/kernel"}
