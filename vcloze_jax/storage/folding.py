"""Adapters as trees: pure nested dicts that hold only lora_a, lora_b and lora_bias (and norms,
where a foreign file replaces them).

The frozen base and the adapter are two trees; a model is their union. No function here knows
which model it is.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


def split(model):
    """A module (or its abstract form) -> graphdef, adapter, base; the trees are pure dicts."""
    graphdef, adapter, base = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)


def fold(tree, adapter, scale=1.0):
    """Fold an adapter into the weights of `tree`, in place and layer by layer, so that two whole
    trees are never held.

    W + scale * A B and b + scale * b_B wherever `adapter` has a branch; a norm that it gives whole
    takes the place of the base's, `scale` of the way. Computed in float32, kept in the dtype of
    the base. ValueError if the base lacks a layer of the adapter.
    """
    if unknown := set(adapter) - set(tree):
        raise ValueError(f"the base has no {', '.join(map(str, sorted(unknown)))}")
    for name, branch in adapter.items():
        if not isinstance(branch, dict):
            norm = (1 - scale) * tree[name].astype(jnp.float32) + scale * branch
            tree[name] = norm.astype(tree[name].dtype)
        elif "lora_a" in branch:
            tree[name] = fold_dense(tree.pop(name), branch, scale)
        else:
            fold(tree[name], branch, scale)


@jax.jit
def fold_dense(dense, branch, scale):
    """One layer, or a stack of them on a leading axis, with its LoRA branch folded in."""

    def add(weight, delta):
        return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)

    a, b = branch["lora_a"].astype(jnp.float32), branch["lora_b"].astype(jnp.float32)
    product = partial(jnp.tensordot, axes=1, precision="highest")
    if a.ndim + b.ndim - 2 > dense["kernel"].ndim:  # of a stack, A and B have its axis each, W once
        product = jax.vmap(product)
    kernel = add(dense["kernel"], product(a, b))
    return dense | dict(kernel=kernel, bias=add(dense["bias"], branch["lora_bias"]))
