"""Adapters against diffusers and peft: theirs is what ours is, both ways."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import lorafiles
import numpy as np
import pytest
import tiny
from flax import nnx
from folders import key_list
from lorafiles import PLAIN, RANKED, renamed, same_tensors
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import FLUX_FILL
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import folding, weights


@pytest.mark.parity
def test_diffusers_applies_our_adapter(tmp_path):
    """load_lora_weights of diffusers at scale 1 gives our velocity (float32, outputs about 10)."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft")
    plain, _, base = weights.abstract(Flux, PLAIN)
    _, adapter, _ = weights.abstract(Flux, RANKED)
    base, adapter = tiny.filled(base), tiny.filled(adapter, 1)
    preset = replace(FLUX_FILL, flux=PLAIN)
    weights.save_pipeline(tmp_path, preset, {"flux": nnx.merge(plain, base)}, "float32")
    file = lorafiles.written(tmp_path, adapter)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    empty = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxFillPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        **dict.fromkeys(empty),
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    (img, txt, vec), ids = lorafiles.inputs(PLAIN)
    with torch.no_grad():
        there = transformer(
            hidden_states=torch.tensor(img),
            encoder_hidden_states=torch.tensor(txt),
            pooled_projections=torch.tensor(vec),
            timestep=torch.tensor([0.3, 0.9]),
            guidance=torch.tensor([1.0, 3.5]),
            img_ids=torch.tensor(ids[5:]),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0].numpy()
    tree = jax.tree.map(jnp.asarray, base)
    folding.fold(tree, jax.tree.map(jnp.asarray, adapter))
    here = lorafiles.velocity(nnx.merge(plain, tree))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)


def full_size(rank=2):
    """The tensors of the authors' adapter, of rank 2 and integers / 8, and the norms of BFL's."""
    rng, out = np.random.default_rng(4), {}
    for key, shape in key_list("visualcloze").items():
        shape = (rank, shape[1]) if "lora_A" in key else (shape[0], rank)[: len(shape)]
        out[key] = np.float32(rng.integers(-8, 9, shape) / 8)
    for key, shape in key_list("flux_bfl").items():
        if key.endswith("_norm.scale"):
            out[key] = np.float32(rng.random(shape))
    return out


@pytest.mark.parity
def test_diffusers_converts_control_adapters_alike(tmp_path):
    """diffusers' converter of BFL's control adapters takes every key of the list, and gives tensor
    for tensor what we write in its naming; but for the A of the last modulation, whose rows it
    swaps though they are no outputs (huggingface/diffusers#13998)."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch = pytest.importorskip("torch")
    mine = full_size()
    save_file(mine, tmp_path / "control.safetensors")
    ours = load_file(renamed(tmp_path / "control.safetensors", "diffusers"))
    theirs = utils._convert_bfl_flux_control_lora_to_diffusers(
        {key: torch.tensor(x) for key, x in mine.items()}
    )
    theirs = {key: x.contiguous().numpy() for key, x in theirs.items()}
    a = "transformer.norm_out.linear.lora_A.weight"
    if not np.array_equal(theirs[a], ours[a]):
        theirs[a] = np.roll(theirs[a], len(theirs[a]) // 2, 0)
    same_tensors(dict(sorted(ours.items())), dict(sorted(theirs.items())))


@pytest.mark.parity
@pytest.mark.parametrize("slope", [1, 4])
def test_diffusers_converts_kohya_adapters_alike(tmp_path, slope):
    """diffusers' converter of kohya's naming, from what we write in it, gives B A as ours, exactly;
    alpha = r, tensor for tensor. (It forgets the prefix of layers outside the blocks, and the alpha
    of the last two.)"""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch = pytest.importorskip("torch")
    tail = ("bias", "scale")
    save_file(
        {key: x for key, x in full_size().items() if not key.endswith(tail)},
        tmp_path / "a.safetensors",
    )
    kohya = renamed(tmp_path / "a.safetensors", "kohya")
    mine = load_file(kohya)
    mine |= {
        key: np.asarray(x * slope, np.float32)
        for key, x in mine.items()
        if key.endswith("alpha") and "final" not in key
    }
    save_file(mine, kohya)
    ours = load_file(renamed(kohya, "diffusers"))
    theirs = utils._convert_kohya_flux_lora_to_diffusers(
        {key: torch.tensor(x) for key, x in mine.items()}
    )
    theirs = {
        "transformer." + key.removeprefix("transformer."): x.contiguous().numpy()
        for key, x in theirs.items()
    }
    if slope == 1:
        same_tensors(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    assert theirs.keys() == ours.keys()
    header = lorafiles.metadata(tmp_path / "diffusers.safetensors")
    assert header["transformer.lora_alpha"] == 2 * slope
    for stem in ("x_embedder", "transformer_blocks.7.attn.to_k", "norm_out.linear") + (
        "single_transformer_blocks.30.proj_mlp",
    ):
        a, b = (f"transformer.{stem}.lora_{x}.weight" for x in "AB")
        scale = 1 if stem == "norm_out.linear" else slope
        np.testing.assert_array_equal(theirs[b] @ theirs[a], scale * (ours[b] @ ours[a]))
