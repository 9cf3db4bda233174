"""Products in bfloat16 (scripts/bfloat16_products.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.bfloat16_products import contract
from vcloze_jax.model import layers


@pytest.mark.parametrize(
    "batch, into, out, is_narrow",
    [
        ((2, 32), (64,), (3, 4, 8), True),
        ((4, 16), (4, 8), (96,), True),
        ((3,), (32,), (64,), False),  # the tokens are no whole blocks
        ((32,), (7,), (64,), False),  # what is read
        ((32,), (32,), (9,), False),  # what is made
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_in_bfloat16_are_those_of_layers(batch, into, out, is_narrow, with_bias):
    """Value and all gradients are those of layers.contract, but for what bfloat16 rounds where all
    sizes are whole blocks: each of two factors by 2 ** -8 at most and 0.0016 as a rule, so that a
    sum of many products is off by 0.0023 of its norm, below 2 ** -8."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    bias = (draw(*out),) if with_bias else ()
    args = draw(*batch, *into), draw(*into, *out), *bias
    cotangent, axes = draw(*batch, *out), (None,) * (len(into) + len(out))

    def compute(function):
        """The value, and the gradients of x, w and perhaps bias."""

        def of(x, w, bias=None):
            return function(x, w, bias, len(into), axes)

        y, pull = jax.vjp(of, *args)
        return y, *pull(cotangent)

    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        all_ours, all_exact = compute(contract), compute(layers.contract)
    for i, (ours, exact) in enumerate(zip(all_ours, all_exact, strict=True)):
        assert ours.shape == exact.shape and ours.dtype == exact.dtype
        error = jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)
        rounds = is_narrow and i < 3  # the bias's gradient is a sum in float32
        assert 1e-3 < error < 2**-8 if rounds else error < 1e-6
