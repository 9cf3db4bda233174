"""Fixture of the tests of placements: velocities of FLUX's blocks in torch, as papers place cells.

Run by scripts/make_fixtures.py (needs torch and diffusers, extra `parity`).
"""

from copy import deepcopy
from pathlib import Path

import fixtures_models
import numpy as np
import torch
from diffusers import FluxKontextPipeline
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).parents[1] / "tests/data"
EXAMPLE, SHOWN, QUERY, TARGET = range(1, 5)
# A grid of cells of 2 x 1 tokens above cells of 1 x 2, the last one blank; as rows, and as cells.
ROWS = [EXAMPLE, SHOWN, EXAMPLE, SHOWN, QUERY, QUERY, TARGET, TARGET]
CELLS = [EXAMPLE, EXAMPLE, SHOWN, SHOWN, QUERY, QUERY, TARGET, TARGET]
CELL_SIZES = [(2, 1), (2, 1), (1, 2), (1, 2)]


@torch.no_grad()
def main():
    """Write tests/data/placements.safetensors: by the transformer of models.safetensors with 64
    channels, and by its inputs, NAME/out, the velocity [2, 8, 64] of all tokens, and their
    NAME/segments and NAME/ids; cond/KEY, what only `frames` has, float16."""
    inputs = load_file(DATA / "models.safetensors")
    flux = fixtures_models.flux(fixtures_models.flux(), in_channels=64)
    extra = third_branch(flux)
    cases = {
        "dev": (ROWS, inputs["grid/ids"], dict(clean_time=0)),
        "kontext": (CELLS, cell_ids([1, 2, 3, 0]), {}),  # FluxTransformer2DModel as it is
        "frames": (CELLS, cell_ids([0, 1, 2, 3]), dict(extra=extra)),
        "klein": (CELLS, cell_ids([1, 2, 3, 0]), dict(clean_time=0, alone=True)),
    }
    arrays = fixtures_models.stored("cond", extra)
    for name, (segments, ids, how) in cases.items():
        clean = torch.tensor(segments) != TARGET
        arrays |= {
            f"{name}/out": velocity(flux, inputs, clean, ids, **how),
            f"{name}/segments": np.uint8(segments),
            f"{name}/ids": np.float32(ids),
        }
    save_file(dict(sorted(arrays.items())), DATA / "placements.safetensors")


def third_branch(flux):
    """Every block's modulation of conditions, and the vector that is added to them."""
    norms = [deepcopy(block.norm1) for block in flux.transformer_blocks]
    norms += [deepcopy(block.norm) for block in flux.single_transformer_blocks]
    embedding = torch.nn.Linear(1, flux.inner_dim)
    modules = dict(norms=torch.nn.ModuleList(norms), embedding=embedding)
    return fixtures_models.randomize(torch.nn.ModuleDict(modules))


def cell_ids(numbers):
    """As FluxKontextPipeline has them, whose reference is 1 and whose target is 0."""
    prepare, cells = FluxKontextPipeline._prepare_latent_image_ids, []
    for number, (h, w) in zip(numbers, CELL_SIZES, strict=True):
        cells.append(prepare(1, h, w, "cpu", torch.float32))
        cells[-1][:, 0] = number
    return torch.cat(cells).numpy()


def velocity(flux, inputs, clean, ids, clean_time=1, extra=None, alone=False):
    """FluxTransformer2DModel.forward, but that clean tokens are told `clean_time` times the time;
    with `extra` they have modulations of their own, and neither see the text nor are seen by it;
    `alone` they see themselves, and all else sees all (Flux2Transformer2DModel, kv_cache_mode)."""
    get = lambda name: torch.tensor(np.float32(inputs[f"in/{name}"][:2]))  # noqa: E731
    t, guidance, pooled = get("t"), get("guidance"), get("pooled")
    now, then = (
        flux.time_text_embed(1000 * time, 1000 * guidance, pooled) for time in (t, clean_time * t)
    )
    img, txt = flux.x_embedder(get("img")[..., :64] / 32), flux.context_embedder(get("txt"))
    T, mask = txt.shape[1], None
    of_all = torch.cat([torch.zeros(T, dtype=bool), clean])
    branches = iter(extra["norms"] if extra else [])
    if extra:
        img = img + clean[:, None] * extra["embedding"](torch.ones(1))
        is_text = torch.arange(len(of_all)) < T
        mask = ~(is_text[:, None] & of_all | of_all[:, None] & is_text)[None, None]
    if alone:
        mask = (~of_all[:, None] | of_all)[None, None]
    pe = flux.pos_embed(torch.cat([torch.zeros(T, 3), torch.tensor(ids)]))

    def choose(norm, x, clean):
        """What a norm gives, and says, to each token by its own vector and weights."""
        own = next(branches, norm)
        pairs = zip(norm(x, emb=now), own(x, emb=then), strict=True)
        along = lambda y: y if y.ndim == 3 else y[:, None]  # noqa: E731
        return [torch.where(clean[:, None], along(b), along(a)) for a, b in pairs]

    for block in flux.transformer_blocks:
        h, gate, shift2, scale2, gate2 = choose(block.norm1, img, clean)
        h_txt, *of_txt = block.norm1_context(txt, emb=now)
        attn, attn_txt = block.attn(h, h_txt, mask, pe)
        img = img + gate * attn
        img = img + gate2 * block.ff(block.norm2(img) * (1 + scale2) + shift2)
        gate, shift2, scale2, gate2 = (y[:, None] for y in of_txt)
        txt = txt + gate * attn_txt
        txt = txt + gate2 * block.ff_context(block.norm2_context(txt) * (1 + scale2) + shift2)
    x = torch.cat([txt, img], 1)
    for block in flux.single_transformer_blocks:
        h, gate = choose(block.norm, x, of_all)
        attn = block.attn(h, None, mask, pe)
        x = x + gate * block.proj_out(torch.cat([attn, block.act_mlp(block.proj_mlp(h))], 2))
    of_target, of_clean = (flux.norm_out(x[:, T:], vec) for vec in (now, then))
    return flux.proj_out(torch.where(clean[:, None], of_clean, of_target)).numpy()


if __name__ == "__main__":
    main()
