"""States of a training, tiny and awkward, for the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def make_sharding(*axes: int) -> NamedSharding:
    """A mesh of as many of `axes` as there are devices for, sharding rows over all of it."""
    names = ("data", "fsdp")[: len(axes)]
    if np.prod(axes) > jax.device_count():
        axes = (1,) * len(axes)
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return NamedSharding(jax.make_mesh(axes, names, axis_types=types), P(names))


def make_state(seed: int, sharding: NamedSharding | None = None, rows: int = 16):
    """A tiny state (trainable, optimizer, extras) with awkward values, its rows over `sharding`."""
    sharding = sharding or make_sharding(8)
    rng = np.random.default_rng(seed)
    awkward = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45, 3e38], np.float32)
    kernel = np.concatenate([awkward, rng.normal(size=rows * 6 - 6).astype(np.float32)])
    trainable = {
        "double": {"lora_a": jnp.asarray(kernel.reshape(rows, 6))},
        "single": {"lora_b": jnp.asarray(rng.normal(size=(rows, 3)), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.device_put(trainable, sharding), optimizer.init(trainable)
    return (*state, {"seed": np.float32(seed), "ids": rng.integers(0, 9, 4)})


def abstract(state, sharding: NamedSharding | None = None):
    """`like` for `state`; arrays of rank 2 go onto `sharding`, if given."""

    def leaf(x):
        if not isinstance(x, jax.Array):
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        place = sharding if sharding and x.ndim == 2 else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, state)


def assert_equal(ours, theirs):
    """Same tree, same types, same bits (NaNs and signed zeros too)."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
