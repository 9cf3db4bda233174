"""Products of a Dense in bfloat16, for CPUs that multiply these many times as fast (AMX).

Sums, and all else, stay float32, as they do on accelerators. XLA has such products from YNNPACK,
which jaxlib 0.10.2 is told to leave alone (devices.ready_xla): take a later one.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from vcloze_jax.model import layers

SIDE = 32  # of a block
exact = layers.contract
product = partial(jnp.dot, preferred_element_type=jnp.float32)


def narrow(x):
    return x.astype(jnp.bfloat16)


def transposed(x):
    """A copy, block by block: what XLA sees to be a transposition it would leave to the product,
    which then comes at a quarter of the speed."""
    rows, columns = x.shape
    x = x.reshape(rows // SIDE, SIDE, columns // SIDE, SIDE).transpose(2, 0, 3, 1)
    return jax.lax.optimization_barrier(x).swapaxes(1, 2).reshape(columns, rows)


def contract(x, w, bias, n, axes):
    """For layers.contract, on one device; what has no whole blocks, as vectors, is exact."""
    tokens, rows = math.prod(x.shape[: x.ndim - n]), math.prod(w.shape[:n])
    whole = not any(size % SIDE for size in (tokens, rows, w.size // rows))
    return (of_blocks if whole else exact)(x, w, bias, n, axes)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def of_blocks(x, w, bias, n, axes):
    return forward(x, w, bias, n, axes)[0]


def forward(x, w, bias, n, axes):
    rows, columns = math.prod(w.shape[:n]), math.prod(w.shape[n:])
    batch = x.shape[: x.ndim - n]
    x = narrow(x.reshape(-1, rows))
    y = product(x, narrow(w.reshape(rows, columns))).reshape(*batch, *w.shape[n:])
    return y if bias is None else y + bias, (x, w, bias)


def backward(n, axes, saved, dy):
    x, w, bias = saved
    batch = dy.shape[: dy.ndim - w.ndim + n]
    dy = dy.reshape(len(x), -1)
    low, matrix = narrow(dy), narrow(w.reshape(x.shape[1], dy.shape[1]))
    dx = product(low, transposed(matrix)).reshape(*batch, *w.shape[:n])
    db = None if bias is None else (jnp.ones(len(dy)) @ dy).reshape(bias.shape)
    return dx, product(transposed(x), low).reshape(w.shape), db


of_blocks.defvjp(forward, backward)
