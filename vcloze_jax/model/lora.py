"""Adapters as trees: pure nested dicts that hold only lora_a, lora_b and lora_bias (and norms,
where a foreign file replaces them).

The frozen base and the adapter are two trees; a model is their union. No function here knows
which model it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def split(model):
    """A module (or its abstract form) -> graphdef, adapter, base; the trees are pure dicts."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)


def combine(graphdef, adapter, base):
    """The inverse of `split`: the module in which base and adapter meet."""
    return nnx.merge(graphdef, adapter, base)


def init(make, key):
    """A new adapter of the module that `make(rngs)` builds: A random, B and its bias zero.

    Under jit, so that the base's random numbers are never drawn.
    """
    return jax.jit(lambda key: split(make(nnx.Rngs(params=key)))[1])(key)


def fold(base, adapter, scale=1.0):
    """W + scale * A B and b + scale * b_B wherever `adapter` has a branch; the rest as it is.

    A norm that the adapter gives whole takes the place of the base's, by `scale` of the way.
    Computed in float32, returned in the dtype of the base. ValueError if the base lacks a layer
    of the adapter.
    """
    if strange := set(adapter) - set(base):
        raise ValueError(f"the base has no {', '.join(map(str, sorted(strange)))}")
    out = dict(base)
    for name, branch in adapter.items():
        if isinstance(branch, dict):
            put = fold_dense if "lora_a" in branch else fold
            out[name] = put(base[name], branch, scale)
        else:
            norm = (1 - scale) * base[name].astype(jnp.float32) + scale * branch
            out[name] = norm.astype(base[name].dtype)
    return out


@jax.jit
def fold_dense(dense, branch, scale):
    """One layer, or a stack of them on a leading axis, with its LoRA branch folded in."""

    def add(weight, delta):
        return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)

    a, b = branch["lora_a"].astype(jnp.float32), branch["lora_b"].astype(jnp.float32)
    kernel = add(dense["kernel"], jnp.matmul(a, b, precision="highest"))
    return dense | dict(kernel=kernel, bias=add(dense["bias"], branch["lora_bias"]))


def count(tree) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
