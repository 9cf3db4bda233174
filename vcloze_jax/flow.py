"""Rectified flow, for any velocity function.

The convention, stated here only: t = 1 is noise, t = 0 is the picture, x_t = (1 - t) x + t noise,
and the velocity is dx/dt = noise - x. Time is float32 from end to end.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def shift_time(t, tokens, c):
    """Times t in (0, 1] moved towards noise, the more the more real image tokens a grid has, and
    without a clamp; 1 stays; c is a FlowConfig
    (black-forest-labs/flux:src/flux/sampling.py, time_shift).

    In sampling always; in training by the paper ("dynamic time shifting"), not by its code.
    """
    slope = (c.max_shift - c.base_shift) / (c.max_tokens - c.base_tokens)
    shift = math.exp(c.base_shift + slope * (tokens - c.base_tokens))
    return shift / (shift + 1 / t - 1)


def schedule(num_steps, tokens, c, strength=1.0):
    """Times of N Euler steps: float32 [N + 1], from 1 down to 0, shifted towards noise.

    A `strength` below 1 leaves out the first steps, but never all: the start then holds a picture
    (huggingface/diffusers:pipelines/flux/pipeline_flux_fill.py, get_timesteps).
    """
    sigma = shift_time(np.linspace(1, 1 / num_steps, num_steps), tokens, c)
    first = min(int(num_steps - num_steps * strength), num_steps - 1)
    return np.append(sigma, 0)[first:].astype(np.float32)


def euler(x, velocity, t, t_next):
    """One step of x float32 [B, S, 64] from t to t_next, float32 [B]."""
    return x + (t_next - t)[:, None, None] * velocity.astype(jnp.float32)


def draw_time(keys, mean=0.0):
    """Training times: sigmoid of a normal of this mean and deviation 1, float32 [B] of B keys.

    Source: lzyhha/VisualCloze:train.py with `--snr_type lognorm`, whose mean is 0. In little noise
    a small picture is seen as it is, and nothing is learned from its neighbours: mini's mean is 1.
    """
    return jax.nn.sigmoid(mean + jax.vmap(lambda key: jax.random.normal(key, (), "f4"))(keys))


def draw_guidance(keys, bounds):
    """Guidance values, log-uniform between two bounds, float32 [B] of B keys."""
    low, high = math.log(bounds[0]), math.log(bounds[1])
    draw = jax.vmap(lambda key: jax.random.uniform(key, (), "f4"))
    return jnp.exp(low + (high - low) * draw(keys))


def interpolate(x, noise, t):
    """x_t and its velocity, for x and noise [B, S, 64] and t [B]."""
    t = t[:, None, None]
    return (1 - t) * x + t * noise, noise - x


def masked_loss(prediction, velocity, share):
    """Squared error in float32, averaged over each sample's tokens by their share: float32 [B].

    `share` float32 [B, S] is that of a token's pixels that count: where it is 0 there is no
    gradient at all. Every sample counts the same, however large its target.
    """
    error = jnp.square(prediction.astype(jnp.float32) - velocity).mean(-1)  # B S
    return (error * share).sum(1) / share.sum(1)
