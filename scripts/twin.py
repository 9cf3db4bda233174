"""The MMDiT of a training step once more, in PyTorch, whose compiler makes faster programs of it
for CPUs; products and attention in bfloat16, all else in float32.

It is what `--rank 0` trains with the text encoders at rest: no adapter, padding or other placement
(vcloze_jax/model/layers.py, whose names and letters these are). `rearrange` makes its weights.
"""

import math

import jax
import numpy as np
import torch
import torch.nn.functional as F

LOW = torch.bfloat16
compiled = torch.compile(dynamic=False)  # by shape; a block's program serves all of its kind


def rearrange(tree, name=""):
    """Flux's weights -> the twin's, float32; linear, so that gradients find the way back.

    Layers are apart, kernels lie as [out, in], and what qkv, linear1 and linear2 do at once is
    apart, too. q and k are there a second time, turned: to rotate pairs of channels is then to add
    two products, and no channel moves.
    """
    if name in ("double", "single"):
        leaves, treedef = jax.tree.flatten(tree)
        return [rearrange(treedef.unflatten(layer)) for layer in zip(*leaves, strict=True)]
    if "scale" in tree:
        return [tree["scale"], swapped(tree["scale"])]
    if "kernel" not in tree:
        return {name: rearrange(part, name) for name, part in tree.items()}
    kernel, bias = tree["kernel"], tree["bias"]
    if name in ("qkv", "linear1"):
        pairs = zip(parts(kernel), parts(bias), strict=True)
        return [{"kernel": w.reshape(len(w), -1).T, "bias": b.reshape(-1)} for w, b in pairs]
    if name == "linear2":
        attn, mlp = (x.reshape(-1, bias.size).T for x in (kernel[:1], kernel[1:]))
        return {"attn": attn, "mlp": mlp, "bias": bias}
    return {"kernel": kernel.reshape(-1, bias.size).T, "bias": bias.reshape(-1)}


def parts(x):
    """[..., 3 or 7, H, K] -> q, k, v, q and k turned, and the MLP's four, where there are any."""
    q, k, v = (x[..., i, :, :] for i in range(3))
    mlp = [x[..., 3:, :, :]] if x.shape[-3] > 3 else []
    return [q, k, v, turned(q), turned(k), *mlp]


def swapped(x):
    """Channels 2i and 2i + 1 exchanged."""
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def turned(x):
    """-x[2i + 1] and x[2i]: what a quarter of a turn makes of pairs of channels."""
    return swapped(x) * np.tile(np.float32([-1, 1]), x.shape[-1] // 2)


def is_product(shape):
    """Whether a leaf of the twin is a kernel, which is multiplied in bfloat16."""
    return len(shape) == 2


def product(x, kernel):
    return F.linear(x.to(LOW), kernel).float()


def dense(x, p):
    return product(x, p["kernel"]) + p["bias"]


def modulate(x, shift, scale):
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def gelu(x):
    """The approximation by a tanh, in its form with an exponential, which is faster."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def qkv(x, of_parts, norms, pe, heads):
    """x [B, S, D] -> q and k, normed and rotated by pe, and v, [B, S, H, K]."""
    x = x.to(LOW)
    q, k, v, *turned = (dense(x, p).unflatten(-1, (heads, -1)) for p in of_parts[:5])

    def rotate(x, turned, scale):
        cos, sin = pe  # [1, S, 1, K], of a channel, not of a pair
        rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return rms * (x * (scale[0] * cos) + turned * (scale[1] * sin))

    return rotate(q, turned[0], norms["q_norm"]), rotate(k, turned[1], norms["k_norm"]), v


class Attention(torch.autograd.Function):
    """softmax(q k^T) v of [N, L, K]. By hand, so that gradients lie as what they are of does."""

    @staticmethod
    def forward(ctx, q, k, v):
        weights = torch.softmax(torch.bmm(q, k.mT).float(), -1).to(LOW)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, weights = ctx.saved_tensors
        dy, w = dy.contiguous(), weights.float()
        d = torch.bmm(dy, v.mT).float()
        d = (w * (d - (w * d).sum(-1, keepdim=True))).to(LOW)
        return torch.bmm(d, k), torch.bmm(d.mT, q), torch.bmm(weights.mT, dy)


def attention(q, k, v):
    """q, k, v [B, L, H, K] -> [B, L, D]."""
    B, L, H, K = q.shape
    heads_first = (x.transpose(1, 2).reshape(B * H, L, K).to(LOW) for x in (q * K**-0.5, k, v))
    return Attention.apply(*heads_first).view(B, H, L, K).transpose(1, 2).flatten(2)


def chunks(p, vec, n):
    """What a vector [B, D] says to a layer: n arrays [B, 1, D]."""
    return dense(vec, p["mod"])[:, None].chunk(n, -1)


def after(p, x, attn, gate1, shift, scale, gate2):
    x = x + gate1 * dense(attn, p["proj"])
    return x + gate2 * dense(gelu(dense(modulate(x, shift, scale), p["mlp_in"])), p["mlp_out"])


@compiled
def double(p, img, txt, vec, pe, heads):
    T, own = txt.shape[1], {"img": chunks(p["img"], vec, 6), "txt": chunks(p["txt"], vec, 6)}
    of_txt, of_img = (
        qkv(modulate(x, *own[side][:2]), p[side]["qkv"], p[side], at, heads)
        for side, x, at in (
            ("txt", txt, [x[:, :T] for x in pe]),
            ("img", img, [x[:, T:] for x in pe]),
        )
    )
    attn = attention(*(torch.cat(pair, 1) for pair in zip(of_txt, of_img, strict=True)))
    img = after(p["img"], img, attn[:, T:], *own["img"][2:])
    return img, after(p["txt"], txt, attn[:, :T], *own["txt"][2:])


@compiled
def single(p, x, vec, pe, heads):
    shift, scale, gate = chunks(p, vec, 3)
    h, out = modulate(x, shift, scale), p["linear2"]
    attn = product(attention(*qkv(h, p["linear1"], p, pe, heads)), out["attn"])
    return x + gate * (attn + product(gelu(dense(h, p["linear1"][5])), out["mlp"]) + out["bias"])


@compiled
def enter(p, img, txt, t, guidance, pooled):
    """Of img, txt and three vectors what blocks take: img [B, S, D], txt [B, T, D], vec [B, D]."""
    vec = embed(p["time_in"], t) + embed(p["vector_in"], pooled)
    if "guidance_in" in p:
        vec = vec + embed(p["guidance_in"], guidance)
    return dense(img, p["img_in"]), dense(txt, p["txt_in"]), F.silu(vec)


def embed(p, x):
    return dense(F.silu(dense(x, p["in_layer"])), p["out_layer"])


@compiled
def leave(p, img, vec):
    return dense(modulate(img, *chunks(p, vec, 2)), p["linear"])


@compiled
def masked_losses(out, velocity, share):
    """Of what is masked and of all rows, [B] each."""
    error = (out - velocity).square().mean(-1)
    return (error * share).sum(1) / share.sum(1), error.mean(1)


def predict(p, noisy, heads, first=0):
    """The velocity [B, S, 64] of a noisy batch's tokens from the `first` on, which then stand where
    a grid begins. Arrays are a NoisyBatch's by name, but for t and guidance their sinusoids
    [B, 256], and pe of every channel, not of pairs.

    Compiled block by block: for a whole step PyTorch needs two or three times as long.
    """
    img = torch.cat([noisy["x_t"], noisy["condition"]], -1)[:, first:].contiguous()
    T = noisy["txt"].shape[1]
    pe = [x[:, : T + img.shape[1]].contiguous() for x in noisy["pe"]]
    told = (noisy[name] for name in ("t", "guidance", "pooled"))
    img, txt, vec = enter(p, img, noisy["txt"], *told)
    for block in p["double"]:
        img, txt = double(block, img, txt, vec, pe, heads)
    x = torch.cat([txt, img], 1)
    for block in p["single"]:
        x = single(block, x, vec, pe, heads)
    return leave(p["final"], x[:, T:], vec)


@torch.no_grad()
def guided(teacher, noisy, heads):
    """The true velocity, of the last row led away from what the teacher says who sees no example,
    towards what it says who sees them all: velocity + strength [B] * (v - u).

    It is classifier-free guidance with examples in place of the text; learnt, it takes one pass.
    """
    first = noisy["x_t"].shape[1] - int(noisy["query"])
    if not first:
        return noisy["velocity"]
    v, u = predict(teacher, noisy, heads)[:, first:], predict(teacher, noisy, heads, first)
    asked = noisy["velocity"].clone()
    asked[:, first:] += noisy["strength"][:, None, None] * (v - u)
    return asked


@torch.no_grad()
def cooled(teacher, noisy, heads):
    """The way on which noise becomes what the teacher makes of less of it, at the noisy batch's
    time: {"x_t", "velocity"} [B, S, 64]. With c the `temperature` [B], y the teacher's way from c
    noise, straight from each of `times` [N + 1, B] to the next, and v its velocity, that is
    y + t (1 - c) noise and v + (1 - c) noise: Euler's steps along it lead from all of the noise to
    the teacher's picture. Times that begin at t leave the data's way, and the teacher's velocity.

    A picture that is drawn at random errs twice as much as the mean of all that may be (squared);
    what begins with less noise, or takes few steps, lies between them. What is given stays as it
    is. `of_times` [N, B, 256] are the sinusoids of all times but the last.
    """
    velocity, asked = noisy["velocity"], noisy["share"][..., None] > 0
    told = noisy["time"], noisy["temperature"], *noisy["times"]
    t, c, *times = (x[:, None, None] for x in told)
    noise = noisy["x_t"] + (1 - t) * velocity
    rest = torch.where(asked, 1 - c, 0) * noise
    x, way = noise - rest - (1 - times[0]) * velocity, None
    for now, then, of_time in zip(times, times[1:], noisy["of_times"], strict=False):
        v = predict(teacher, noisy | {"x_t": x, "t": of_time}, heads)
        v = torch.where(asked, v, velocity)
        x = x + (torch.clamp(t, then, now) - now) * v
        way = v if way is None else torch.where(t <= now, v, way)
    return {"x_t": x + t * rest, "velocity": way + rest}


def losses(p, noisy, heads, teacher=None):
    """step.losses_by_region of a noisy batch (see `predict`), "target" and "grid", [B] each; what
    a teacher is told says which way it teaches."""
    if "strength" in noisy:
        noisy = noisy | {"velocity": guided(teacher, noisy, heads)}
    if "temperature" in noisy:
        noisy = noisy | cooled(teacher, noisy, heads)
    return masked_losses(predict(p, noisy, heads), noisy["velocity"], noisy["share"])
