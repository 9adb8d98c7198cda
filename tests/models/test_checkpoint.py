import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.models.checkpoint import (
    CheckpointEntry,
    check_checkpoint,
    from_params,
    to_params,
)


def layout(path):
    """Kernels transposed under `w/...`, everything else as it is."""
    name = "/".join(path)
    return (
        CheckpointEntry(f"w/{name}", axes=(2, 0, 1))
        if path[-1] == "kernel"
        else CheckpointEntry(name)
    )


def test_conversion_permutes_axes_and_back():
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    checkpoint = {"w/a/kernel": kernel, "a/bias": np.arange(2, dtype=np.float64)}
    template = {"a": {"kernel": jnp.zeros((4, 2, 3)), "bias": jnp.zeros(2)}}
    params = to_params(checkpoint, template, layout)
    assert params["a"]["kernel"][3, 1, 2] == kernel[1, 2, 3]
    assert jax.tree.map(lambda leaf: leaf.dtype, params) == {
        "a": {"kernel": jnp.float32, "bias": jnp.float32}
    }
    back = from_params(params, layout)
    assert back.keys() == checkpoint.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, checkpoint[key])


def test_one_error_lists_everything_wrong():
    checkpoint = {"same": np.zeros(2), "shape": np.zeros((2, 3)), "type": np.zeros(4, np.uint8)}
    checkpoint |= {"extra": np.zeros(1)}
    with pytest.raises(ValueError, match="another architecture") as error:
        check_checkpoint(checkpoint, {"same": (2,), "shape": (3, 2), "type": (4,), "gone": ()})
    message = str(error.value)
    assert "1 missing (gone)" in message
    assert "1 unexpected (extra)" in message
    assert (
        "2 of another shape or type (shape is float64[2, 3] in place of float[3, 2], "
        "type is uint8[4] in place of float[4])"
    ) in message


def test_long_lists_are_cut_but_counted():
    expected = {f"key{index:03d}": (1,) for index in range(123)}
    with pytest.raises(ValueError, match="123 missing") as error:
        check_checkpoint({}, expected)
    assert "key004 and 118 more" in str(error.value)
    assert "0 unexpected;" in str(error.value)
    assert len(str(error.value)) < 300
