"""Products in bfloat16 (scripts/bfloat16_products.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.bfloat16_products import contract
from vcloze_jax.model import layers


@pytest.mark.parametrize(
    "batch, into, out",
    [
        ((2, 32), (64,), (3, 4, 8)),
        ((4, 16), (4, 8), (96,)),
        ((3,), (20,), (12,)),
        ((2, 5), (7,), (9,)),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_in_bfloat16_are_those_of_layers(batch, into, out, with_bias):
    """Value and all gradients are those of layers.contract, but for what bfloat16 rounds: inputs
    to 8 bits, hence 2 ** -8 of a product's norm at most, and less where many are summed."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    bias = draw(*out) if with_bias else None
    args = draw(*batch, *into), draw(*into, *out), bias
    cotangent, axes = draw(*batch, *out), (None,) * (len(into) + len(out))

    def both(function):
        y, pull = jax.vjp(lambda *args: function(*args, len(into), axes), *args)
        return jax.tree.leaves((y, pull(cotangent)))

    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        for ours, exact in zip(both(contract), both(layers.contract), strict=True):
            assert ours.shape == exact.shape and ours.dtype == exact.dtype
            assert jnp.linalg.norm(ours - exact) < 2**-8 * jnp.linalg.norm(exact)
