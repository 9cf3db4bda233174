"""diffusers and transformers read what we write, and make of BFL's files what we make of them."""

import types
from dataclasses import replace

import folders
import jax.numpy as jnp
import numpy as np
import pytest
from folders import FLUX, PRESET, SINGLES, VARIANTS, key_list, module
from safetensors.numpy import load_file, save_file

from vcloze_jax.model.ops import rope_table
from vcloze_jax.model.vae import VAE
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.storage import weights

pytestmark = pytest.mark.parity


def narrow(convert, width):
    """diffusers' converter of the transformer for another width than the one written in it."""
    code = convert.__code__
    assert code.co_consts.count(FULL) == 1
    constants = tuple(width if x == FULL else x for x in code.co_consts)
    return types.FunctionType(code.replace(co_consts=constants), convert.__globals__)


FULL = 3072


def converted(field, there, width=FULL):
    """BFL's tensors in diffusers' naming, by diffusers' own converters."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    if field == "flux":
        return narrow(utils.convert_flux_transformer_checkpoint_to_diffusers, width)(there)
    levels = {f"{way}_block_types": ("",) * 4 for way in ("down", "up")}
    return utils.convert_ldm_vae_checkpoint(there, levels)


def test_diffusers_converts_bfls_files_as_we_do(bfl, tmp_path):
    """BFL's files, converted by diffusers and loaded by us in diffusers' naming, are the bits that
    we read from them at once."""
    torch = pytest.importorskip("torch")
    folder = folders.copy(bfl, tmp_path)
    mine = {}
    for field, name in SINGLES.items():
        cls, part = weights.MODELS[field]
        mine[field] = folders.leaves(weights.load(cls, getattr(PRESET, field), bfl))
        there = {key: torch.tensor(x) for key, x in load_file(folder / name).items()}
        there = {key: x.contiguous().numpy() for key, x in converted(field, there, 24).items()}
        (folder / name).unlink()
        (folder / part.folder).mkdir(exist_ok=True)
        save_file(there, folder / part.folder / f"{part.stem}.safetensors")
    for field, wanted in mine.items():
        model = weights.load(weights.MODULES[field], getattr(PRESET, field), folder)
        for path, leaf in folders.leaves(model).items():
            np.testing.assert_array_equal(leaf, wanted[path], strict=True, err_msg=path)


@pytest.mark.parametrize("field", SINGLES)
def test_the_full_key_lists_are_diffusers(field):
    """The keys of BFL's list, converted by diffusers at full size, are those of its own list."""
    torch = pytest.importorskip("torch")
    there = {
        key: torch.empty(shape, device="meta") for key, shape in key_list(f"{field}_bfl").items()
    }
    shapes = {key: tuple(x.shape) for key, x in converted(field, there).items()}
    assert shapes == key_list(field)
    assert not there or field == "vae"  # the transformer's takes what it uses out of its input


def test_bfls_files_compute_what_diffusers_computes(saved, bfl):
    """Transformer and autoencoder from BFL's files give the velocity and the pictures of diffusers'
    models of the same weights (atol: float32 sums in another order)."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    mine = weights.load(weights.MODULES["flux"], FLUX, bfl)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(saved / "transformer")
    given = inputs(FLUX, (1.0, 1.0))
    here, there = our_velocity(mine, *given), their_velocity(theirs, *given)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
    mine = weights.load(VAE, PRESET.vae, bfl)
    theirs = diffusers.AutoencoderKL.from_pretrained(saved / "vae")
    z = np.random.default_rng(2).standard_normal((1, 4, 6, 16)).astype(np.float32)
    with torch.no_grad():
        raw = torch.tensor(z).permute(0, 3, 1, 2) / PRESET.vae.scale + PRESET.vae.shift
        picture = theirs.decode(raw, return_dict=False)[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mine.decode(jnp.asarray(z)), picture, rtol=0, atol=1e-5)


def inputs(config, guidance):
    """Two grids of 2 rows x 3 x 2 tokens and 5 text tokens: model inputs as NumPy, and ids."""
    rng = np.random.default_rng(1)
    ids = np.zeros((12, 3))
    ids[:, 0] = 1 + np.arange(12) // 6
    ids[:, 1], ids[:, 2] = np.arange(12) % 6 // 3, np.arange(12) % 3
    draw = [(2, 12, config.in_channels), (2, 5, config.text_width), (2, config.vec_width)]
    img, txt, vec = (rng.standard_normal(shape).astype(np.float32) for shape in draw)
    return img, txt, vec, np.float32([0.3, 0.9]), np.float32(guidance), ids


def our_velocity(model, img, txt, vec, t, guidance, ids):
    pe = rope_table(np.concatenate([np.zeros((5, 3)), ids])[None], (4, 4, 4), 10_000)
    mod = model.modulation(jnp.asarray(t), jnp.asarray(guidance), jnp.asarray(vec))
    return np.asarray(model(jnp.asarray(img), jnp.asarray(txt), mod, pe))


def their_velocity(model, img, txt, vec, t, guidance, ids):
    torch = pytest.importorskip("torch")
    img, txt, vec, t, guidance, ids = map(torch.tensor, (img, txt, vec, t, guidance, ids))
    with torch.no_grad():
        return model(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=vec,
            timestep=t,
            guidance=guidance if model.config.guidance_embeds else None,
            img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0].numpy()


@pytest.mark.parametrize(
    ("name", "guidance", "tolerance"),
    [
        # torch's exp is one unit off in two frequencies, which 3.5 * 1000 makes 1e-4 radians
        ("flux", (1.0, 3.5), 3e-4),
        ("flux", (30.0, 50.0), 2e-3),  # and 30 * 1000 makes 1e-3 radians
        # float32 sums of a 5-block model, in another order
        ("flux without guidance", (1.0, 1.0), 1e-4),
        ("flux of 64 channels", (1.0, 3.5), 3e-4),
    ],
)
def test_diffusers_transformer(tmp_path, name, guidance, tolerance):
    """diffusers loads what we write, no key missing or unexpected, and computes our velocity."""
    diffusers = pytest.importorskip("diffusers")
    config = VARIANTS[name][1]
    mine = module("flux", config)
    weights.save_pipeline(tmp_path, replace(PRESET, flux=config), {"flux": mine}, "float32")
    theirs, info = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    there, here = (
        f(m, *inputs(config, guidance)) for f, m in ((their_velocity, theirs), (our_velocity, mine))
    )
    np.testing.assert_allclose(here, there, rtol=0, atol=tolerance)


def test_diffusers_vae(saved):
    """diffusers' autoencoder, loaded from our folder, has our moments and our pictures, for sides
    that are not square (atol: float32 sums in another order)."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    theirs, info = diffusers.AutoencoderKL.from_pretrained(saved / "vae", output_loading_info=True)
    assert not any(info.values()), info
    mine = module("vae", PRESET.vae)
    x = np.random.default_rng(2).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
        z = (posterior.mean - theirs.config.shift_factor) * theirs.config.scaling_factor
        raw = z / theirs.config.scaling_factor + theirs.config.shift_factor
        picture = theirs.decode(raw, return_dict=False)[0].permute(0, 2, 3, 1).numpy()
    z, std = (y.permute(0, 2, 3, 1).numpy() for y in (z, posterior.std))
    np.testing.assert_allclose(mine.encode(x), z, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mine.moments(x)[1], std, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mine.decode(jnp.asarray(z)), picture, rtol=0, atol=1e-5)


def test_transformers_text_encoders(saved):
    """transformers loads both text encoders from our folder and computes what ours do (atol:
    float32 sums in another order)."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    ids = np.random.default_rng(3).integers(0, 23, (2, 77))
    ids[0, 20:] = 23
    ids[1, 76] = 23
    for field, name in (("t5", "T5EncoderModel"), ("clip", "CLIPTextModel")):
        part = PARTS[field]
        theirs, info = getattr(transformers, name).from_pretrained(
            saved / part.folder, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            out = theirs(torch.tensor(ids))
        out = out.pooler_output if field == "clip" else out.last_hidden_state
        here = module(field, getattr(PRESET, field))(jnp.asarray(ids))
        np.testing.assert_allclose(here, out.numpy(), rtol=0, atol=1e-5)
