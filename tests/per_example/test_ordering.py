import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradnorm_jax.per_example.ordering import after

X = jnp.asarray([0.0, -2.5, jnp.inf, jnp.nan])


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, jnp.inf, jnp.nan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_value_is_the_same_whatever_the_event(number, dtype):
    events = [jnp.full((2, 3), number, dtype), jnp.arange(3), jnp.zeros((0, 2))]
    np.testing.assert_array_equal(jax.jit(after)(X, events), X)


def test_what_follows_is_computed_anew():
    kernel = images = jnp.ones((256, 256))

    def flops(later):
        def layers(kernel, images):
            for _ in range(8):
                images = images @ later(kernel, images) ** 3
            return images

        return jax.jit(layers).lower(kernel, images).compile().cost_analysis()["flops"]

    assert flops(after) >= flops(lambda kernel, images: kernel) + 7 * 2 * kernel.size
