import jax

from gradnorm_jax.evaluation.step import Placement, place_model
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
