"""Weights in and out: every tensor used once, nothing lost, nothing wrong let through."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ports import __main__ as command
from ports import flux, read, text, vae
from ports.rows import Table, find
from vcloze_jax import weights
from vcloze_jax.config import (
    FLUX_FILL,
    MINI,
    CLIPConfig,
    FluxConfig,
    T5Config,
    UserError,
    VAEConfig,
)
from vcloze_jax.mmdit import Flux
from vcloze_jax.ops import rope_table
from vcloze_jax.vae import VAE

DATA = Path(__file__).parent / "data"
FLUX = FluxConfig(
    width=24,
    heads=2,
    double_blocks=2,
    single_blocks=3,
    text_width=10,
    vec_width=6,
    axes_dim=(4, 4, 4),
    remat=False,
)
PRESET = replace(
    MINI,
    flux=FLUX,
    vae=VAEConfig(channels=(4, 8, 8, 8), groups=2, scale=0.5, shift=0.1),
    t5=T5Config(vocab=24, width=10, head_dim=4, heads=2, mlp=12, layers=2, max_length=96),
    clip=CLIPConfig(vocab=24, width=6, heads=2, mlp=12, layers=2, eos=23),
)
VARIANTS = {
    "flux": ("flux", FLUX),
    "flux without guidance": ("flux", replace(FLUX, guidance_embed=False)),
    "flux of 64 channels": ("flux", replace(FLUX, in_channels=64)),
    "vae": ("vae", PRESET.vae),
    "t5": ("t5", PRESET.t5),
    "clip": ("clip", PRESET.clip),
}


def shapes(field, config):
    return weights.shapes(weights.abstract(weights.MODELS[field][0], config)[2])


def arrays(field, config, dtype="float32", seed=0):
    """{path: random array} of a model's base."""
    rng = np.random.default_rng(seed)
    draw = {p: 0.2 * rng.standard_normal(s) for p, s in shapes(field, config).items()}
    return {path: array.astype(dtype) for path, array in draw.items()}


def module(field, config, seed=0):
    graphdef, _, base = weights.abstract(weights.MODELS[field][0], config)
    leaves = map(jnp.asarray, arrays(field, config, seed=seed).values())
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(base), leaves))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny preset as a weights folder (float32), its tokenizer standing for both."""
    folder = tmp_path_factory.mktemp("weights")
    models = {field: module(field, getattr(PRESET, field)) for field in weights.MODELS}
    weights.save_pipeline(folder, PRESET, models, "float32")
    tokenizer = folder / "tokenizer_2" / "tokenizer_config.json"
    weights.write_json(tokenizer, {"model_max_length": 96})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` that a test may spoil."""
    for file in saved.rglob("*.*"):
        (tmp_path / file.relative_to(saved)).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file.relative_to(saved)).write_bytes(file.read_bytes())
    return tmp_path


def key_list(name):
    lines = (DATA / f"keys_{name}.txt").read_text().splitlines()
    return {key: tuple(map(int, shape)) for key, *shape in map(str.split, lines)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    """Ours, written in the foreign naming and read again, is the same to the last bit."""
    field, config = VARIANTS[name]
    part, mine = weights.MODELS[field][1], arrays(field, config, dtype)
    read.write(tmp_path, part.stem, read.export(part.table, mine.items()), dtype)
    source = read.Source(tmp_path)
    leaves = read.plan(part.table, shapes(field, config), source)
    again = {leaf.path: read.fetch(leaf, source) for leaf in leaves}
    assert again.keys() == mine.keys()
    for path, array in mine.items():
        assert again[path].dtype == array.dtype and again[path].tobytes() == array.tobytes(), path
    there = load_file(tmp_path / f"{part.stem}.safetensors")
    assert sum(x.size for x in there.values()) == sum(x.size for x in mine.values())


def test_bfl_naming_round_trip(tmp_path):
    """The MMDiT keeps its bits through Black Forest Labs' naming too, halves unswapped."""
    mine = arrays("flux", FLUX)
    there = dict(read.export(flux.BFL, mine.items()))
    np.testing.assert_array_equal(
        there["final_layer.adaLN_modulation.1.bias"], mine["final/mod/bias"]
    )
    save_file(there, tmp_path / "model.safetensors")
    source = read.Source(tmp_path / "model.safetensors")
    for leaf in read.plan(flux.BFL, shapes("flux", FLUX), source):
        np.testing.assert_array_equal(read.fetch(leaf, source), mine[leaf.path])


@pytest.mark.parametrize(
    ("field", "tensors"), [("flux", 1160), ("vae", 244), ("t5", 220), ("clip", 196)]
)
def test_full_size_keys_are_covered(field, tensors):
    """Every key of the published models is used once or ignored, every leaf of ours is filled,
    every shape agrees: at full size, from lists that diffusers and transformers made."""
    keys = key_list(field)
    assert len(keys) == tensors
    part, wanted = weights.MODELS[field][1], shapes(field, getattr(FLUX_FILL, field))
    source = SimpleNamespace(header={key: (shape, "BF16") for key, shape in keys.items()})
    leaves = read.plan(part.table, wanted, source)
    used = [piece.key for leaf in leaves for piece in leaf.pieces]
    assert len(used) == len(set(used)) and len(leaves) == len(wanted)
    ignored = set(keys) - set(used)
    assert ignored == ({"encoder.embed_tokens.weight"} if field == "t5" else set())


def test_full_size_bfl_has_780_tensors():
    """BFL's transformer file has 780 tensors and 11,902,391,360 numbers."""
    wanted = shapes("flux", FLUX_FILL.flux)
    pieces = [p for path, s in wanted.items() for p in read.leaf(flux.BFL, path, s).pieces]
    assert len({piece.key for piece in pieces}) == len(pieces) == 780
    assert sum(np.prod(piece.shape) for piece in pieces) == 11_902_391_360


def test_every_row_is_used():
    """No row of a table is dead: each is the row of some leaf of the full models."""
    tables = [(flux.BFL, "flux"), (flux.DIFFUSERS, "flux"), (vae.DIFFUSERS, "vae")]
    tables += [(text.T5.table, "t5"), (text.CLIP.table, "clip")]
    for table, field in tables:
        rest = list(table.rows)
        for path in shapes(field, getattr(FLUX_FILL, field)):
            first = next(row for row in table.rows if matches(row, path))
            rest = [row for row in rest if row != first]
        assert not rest


def matches(row, path):
    try:
        return find(Table((row,)), path)
    except KeyError:
        return None


def test_meaning_of_the_rows():
    """Fused outputs are q, k, v, mlp in this order; kernels are transposed; only the final
    modulation has its halves swapped; layers are counted along the first axis."""
    mine = arrays("flux", FLUX)
    there, D = dict(read.export(flux.DIFFUSERS, mine.items())), FLUX.width
    kernel, bias = mine["single/linear1/kernel"], mine["single/linear1/bias"]
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        span = slice(i * D, (i + 1) * D if i < 3 else None)
        stem = f"single_transformer_blocks.2.{name}"
        np.testing.assert_array_equal(there[f"{stem}.weight"], kernel[2][:, span].T)
        np.testing.assert_array_equal(there[f"{stem}.bias"], bias[2][span])
    shift, scale = np.split(mine["final/mod/kernel"], 2, -1)
    np.testing.assert_array_equal(there["norm_out.linear.weight"], np.hstack([scale, shift]).T)
    mod = mine["double/txt/mod/kernel"][1]
    np.testing.assert_array_equal(there["transformer_blocks.1.norm1_context.linear.weight"], mod.T)
    conv = arrays("vae", PRESET.vae)["decoder/up/0/sample/conv/kernel"]
    ((_, value), *_) = read.export(vae.DIFFUSERS, [("decoder/up/0/sample/conv/kernel", conv)])
    assert value[3, 5, 1, 2] == conv[1, 2, 5, 3]


def test_shards(tmp_path):
    """Shards respect the limit, their index names every key, and they read as one file does."""
    mine = arrays("vae", PRESET.vae)
    read.write(tmp_path, "model", read.export(vae.DIFFUSERS, mine.items()), "float32", 20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (
        len(files) > 3 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    )
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 20_000 for file in files)
    source = read.Source(tmp_path)
    for leaf in read.plan(vae.DIFFUSERS, shapes("vae", PRESET.vae), source):
        np.testing.assert_array_equal(read.fetch(leaf, source), mine[leaf.path])
    read.write(tmp_path, "model", read.export(vae.DIFFUSERS, mine.items()), "float32")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


X, OUT = "x_embedder.weight", "proj_out.weight"
QKV = "transformer_blocks.1.attn.to_k.weight"


def rename(old, new):
    return lambda d: {new if key == old else key: x for key, x in d.items()}


def change(key, f):
    return lambda d: d | {key: np.ascontiguousarray(f(d[key]))}


def drop(key):
    return lambda d: {k: x for k, x in d.items() if k != key}


# what is done to the transformer's file -> what the error must say
SPOILED = {
    "missing": (drop(QKV), [QKV, "[24, 24] is missing"]),
    "missing layer": (
        drop("single_transformer_blocks.2.proj_mlp.bias"),
        ["blocks.2.proj_mlp.bias"],
    ),
    "extra": (lambda d: d | {"more.weight": d[X]}, ["more.weight [24, 384] is unknown"]),
    "extra layer": (
        lambda d: d | {"transformer_blocks.2.attn.to_k.weight": d[QKV]},
        ["transformer_blocks.2.attn.to_k.weight [24, 24] is unknown"],
    ),
    "renamed": (rename(X, "x_embed.weight"), [f"{X} [24, 384] is missing", "x_embed.weight"]),
    "prefixed": (
        lambda d: {f"model.{key}": x for key, x in d.items()},
        ["transformer_blocks.0.attn.norm_k.weight [12] is missing", "more"],
    ),
    "transposed": (change(X, np.transpose), [f"{X} is [384, 24], expected [24, 384]"]),
    "mis-shaped": (change(QKV, lambda x: x[:-1]), [f"{QKV} is [23, 24], expected [24, 24]"]),
    "flattened": (change(OUT, np.ravel), [f"{OUT} is [1536], expected [64, 24]"]),
    "wrong base": (change(X, lambda x: x[:, :64]), [X, "[24, 64]", "FLUX.1-dev", "FLUX.1-Fill"]),
    "integers": (change(X, lambda x: x.astype(np.int32)), [f"{X} is of type I32"]),
    "empty": (lambda d: {}, ["is missing", " more"]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_keys_are_refused(folder, kind):
    """A file that does not fit is one line that names the key, what it is and what it should be,
    at most ten of them, and that before a tensor is read."""
    spoil, words = SPOILED[kind]
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError) as error:
        weights.check(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}/transformer: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert len(message.split("; ")) <= 11


def test_non_finite_tensors_are_named(folder):
    """NaN and infinity are refused by name when tensors are read, and only then."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for value in (np.nan, np.inf):
        good = load_file(file)
        save_file(good | {QKV: np.full_like(good[QKV], value)}, file)
        weights.check(folder)
        with pytest.raises(UserError, match=re.escape(f"{QKV} holds NaN or infinity")):
            weights.load(Flux, FLUX, folder)


def twice(header):
    """The header's JSON with its first tensor repeated."""
    entry = re.search(rb'"[^"]+":\{"dtype"[^}]*\}', header).group()
    return b"{" + entry + b"," + header[1:]


@pytest.mark.parametrize("kind", ["cut", "garbage", "gone", "twice", "nothing"])
def test_broken_files_are_refused(folder, kind):
    """A file that is cut, no safetensors, absent or lists a key twice is a user's error."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    doubled = twice(header.rstrip())
    doubled += b" " * (-len(doubled) % 8)
    new = {
        "cut": whole[: len(whole) // 2],
        "garbage": b"\xff" * 100,
        "twice": len(doubled).to_bytes(8, "little") + doubled + whole[8 + len(header) :],
        "nothing": b"",
    }
    file.unlink() if kind == "gone" else file.write_bytes(new[kind])
    with pytest.raises(UserError, match="twice" if kind == "twice" else "safetensors"):
        weights.check(folder)


def test_disagreeing_shards_are_refused(folder):
    """An index that lacks a key, lists one too many or is no index, a key in two shards, a shard
    that is gone, and an index beside a single file are errors."""
    part = folder / "vae"
    tensors = load_file(part / "diffusion_pytorch_model.safetensors")
    index = part / "diffusion_pytorch_model.safetensors.index.json"

    def write():
        read.write(part, "diffusion_pytorch_model", tensors.items(), "float32", 20_000)
        return json.loads(index.read_text())

    def refused(match, entries=None):
        if entries is not None:
            index.write_text(json.dumps(entries))
        with pytest.raises(UserError, match=match):
            weights.check(folder)

    entries = write()
    where, key = entries["weight_map"], next(iter(tensors))
    refused("disagree about ghost", {"weight_map": where | {"ghost": where[key]}})
    refused(re.escape(key), {"weight_map": {k: v for k, v in where.items() if k != key}})
    refused("no index", {"weights": 1})
    refused("no index", [])
    write()
    shard = part / next(name for name in where.values() if name != where[key])
    save_file(load_file(shard) | {key: tensors[key]}, shard)
    refused(f"{re.escape(key)} is in .* and in ")
    shard.unlink()
    refused(shard.name)
    write()
    save_file(tensors, part / "diffusion_pytorch_model.safetensors")
    refused("remove the one that is old")


def test_save_and_load_is_the_identity(saved, tmp_path):
    """A saved folder gives back every array and every size; bfloat16 rounds once; the loaded
    module lies where `sharding` says."""
    preset = weights.check(saved)
    assert preset == PRESET
    for field, (cls, _) in weights.MODELS.items():
        config = getattr(PRESET, field)
        mine = arrays(field, config)
        for dtype in ("float32", "bfloat16"):
            loaded = weights.load(cls, config, saved, dtype)
            for path, leaf in weights.flat(nnx.to_pure_dict(nnx.state(loaded))).items():
                np.testing.assert_array_equal(leaf, mine[path].astype(dtype))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=None)
    loaded = weights.load(
        VAE, PRESET.vae, saved, sharding=lambda t: jax.tree.map(lambda _: place, t)
    )
    assert {leaf.sharding for leaf in jax.tree.leaves(nnx.state(loaded))} == {place}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_with_and_without_prefix(folder, prefix):
    """CLIP files of transformers 4 (with a prefix, and position ids) and 5 (without) both load."""
    file = folder / "text_encoder" / "model.safetensors"
    good = {key.removeprefix("text_model."): x for key, x in load_file(file).items()}
    good["embeddings.position_ids"] = np.arange(77)[None]
    save_file({prefix + key: x for key, x in good.items()}, file)
    weights.check(folder)


CONFIGS = {
    "not JSON": ("transformer", None, "cannot be read as JSON"),
    "text": ("transformer", {"num_layers": "2"}, "num_layers cannot be '2'"),
    "boolean": ("transformer", {"num_layers": True}, "num_layers cannot be True"),
    "negative": ("vae", {"layers_per_block": -1}, "layers_per_block cannot be -1"),
    "infinite": ("vae", {"scaling_factor": float("inf")}, "scaling_factor cannot be inf"),
    "list": ("transformer", {"axes_dims_rope": [4, "4", 4]}, "axes_dims_rope cannot be '4'"),
    "axes": ("transformer", {"axes_dims_rope": [4, 4, 6]}, "must sum to the head dim 12"),
    "class": ("transformer", {"_class_name": "SD3Transformer2DModel"}, "FluxTransformer2DModel"),
    "patch": ("transformer", {"patch_size": 2}, "patch_size is 2"),
    "quant": ("vae", {"use_quant_conv": True}, "use_quant_conv"),
    "relu": ("text_encoder_2", {"feed_forward_proj": "relu"}, "gated-gelu"),
    "gelu": ("text_encoder", {"hidden_act": "gelu"}, "quick_gelu"),
    "deeper": ("text_encoder", {"num_hidden_layers": 3}, "encoder.layers.2"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_configs_are_refused(folder, kind):
    """An entry of a config.json of the wrong type, out of range or of another architecture is an
    error that names the file and the entry."""
    part, entries, words = CONFIGS[kind]
    file = folder / part / "config.json"
    old = json.loads(file.read_text())
    file.write_text("{" if entries is None else json.dumps(old | entries))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        weights.check(folder)
    assert str(error.value).startswith(str(folder / part))


def test_wrong_folders_are_refused(folder, tmp_path_factory):
    """A preset that nobody knows, an adapter in place of a weights folder and the reverse are
    errors that say so."""
    for name in ("big", [], 3):
        weights.write_json(folder / "vcloze.json", {"preset": name})
        with pytest.raises(UserError, match="with a name of mini, flux-fill"):
            weights.check(folder)
    with pytest.raises(UserError, match="a weights folder, not an adapter"):
        weights.check_lora(folder, FLUX)
    adapter = tmp_path_factory.mktemp("adapter")
    save_file({"transformer.x_embedder.lora_A.weight": np.zeros(1)}, adapter / "a.safetensors")
    with pytest.raises(UserError, match="an adapter, not a weights folder"):
        weights.check(adapter)


def test_configs_as_published(folder):
    """The configs of FLUX.1 read right where they differ from ours: CLIP's legacy end token 2 is
    the highest id, out_channels is absent, the folder names no preset."""
    for part, drop, add in (
        ("transformer", ("out_channels",), {"in_channels": 64}),
        ("text_encoder", (), {"eos_token_id": 2}),
    ):
        file = folder / part / "config.json"
        old = json.loads(file.read_text()) | add
        file.write_text(json.dumps({k: v for k, v in old.items() if k not in drop}))
    (folder / "vcloze.json").unlink()
    preset = weights.load_preset(folder)
    assert preset.clip.eos == 23 and preset.flux.out_channels == 64
    assert preset.train == FLUX_FILL.train and preset.resolution == 384
    assert preset.flux.remat


KEY = "double_blocks.0.img_attn.qkv"
KINDS = {
    "kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"}, "kohya"),
    "visualcloze": ({f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"}, "VisualCloze"),
    "bfl": ({f"{KEY}.weight", "img_in.weight"}, "transformer in Black Forest Labs"),
    "comfy": ({f"model.diffusion_model.{KEY}.weight"}, "transformer in Black Forest Labs"),
    "ae": ({"encoder.down.0.block.0.conv1.weight"}, "autoencoder in Black Forest Labs"),
    "bare": ({"transformer_blocks.0.attn.to_q.weight"}, "without its folder"),
    "other": ({"wte.weight"}, "neither weights nor an adapter"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_recognises_by_content(tmp_path, kind):
    """A file says what it is by its keys, whatever its name and folder; what is not yet supported
    is an error that says so."""
    keys, words = KINDS[kind]
    save_file({key: np.zeros(1) for key in keys}, tmp_path / "flux1-fill-dev.safetensors")
    for path in (tmp_path, tmp_path / "flux1-fill-dev.safetensors"):
        with pytest.raises(UserError, match=f"{words}.*not yet supported"):
            weights.recognise(path)


def test_recognises_folders_and_pickles(saved, tmp_path):
    """A weights folder is known by its transformer; a pickle is never opened."""
    assert weights.recognise(saved) == "diffusers"
    for start in (b"PK\x03\x04", b"\x80\x02"):
        (tmp_path / "lora.safetensors").write_bytes(start + bytes(100))
        with pytest.raises(UserError, match="pickle"):
            weights.recognise(tmp_path / "lora.safetensors")
    for path in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "lora.safetensors").unlink(missing_ok=True)
        with pytest.raises(UserError, match=str(path)):
            weights.recognise(path)


def test_command(saved, tmp_path, capsys):
    """`python -m ports` writes a folder of ours in bfloat16 with all that lay beside the tensors;
    doing it twice changes no byte; errors are one line and exit 2."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert command.main([str(saved), "--out", str(first)]) == 0
    assert command.main([str(first), "--out", str(second)]) == 0
    names = {file.relative_to(saved) for file in saved.rglob("*.*")}
    for folder in (first, second):
        assert {file.relative_to(folder) for file in folder.rglob("*.*")} == names
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    assert weights.check(first) == PRESET
    loaded = load_file(first / "vae" / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in loaded.values()} == {np.dtype(ml_dtypes.bfloat16)}
    capsys.readouterr()
    for source, out in ((saved, first), (tmp_path / "nowhere", tmp_path / "new")):
        assert command.main([str(source), "--out", str(out)]) == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


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


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "guidance", "tolerance"),
    [
        # float32 sums of a 5-block model, in another order
        ("flux", (1.0, 3.5), 1e-4),
        # torch's exp is one unit off in two frequencies, which 30 * 1000 makes 1e-3 radians
        ("flux", (30.0, 50.0), 2e-3),
        ("flux without guidance", (1.0, 1.0), 1e-4),
        ("flux of 64 channels", (1.0, 3.5), 1e-4),
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


@pytest.mark.parity
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


@pytest.mark.parity
def test_transformers_text_encoders(saved):
    """transformers loads both text encoders from our folder and computes what ours do (atol:
    float32 sums in another order)."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    ids = np.random.default_rng(3).integers(0, 23, (2, 77))
    ids[0, 20:] = 23
    ids[1, 76] = 23
    for field, name in (("t5", "T5EncoderModel"), ("clip", "CLIPTextModel")):
        part = weights.MODELS[field][1]
        theirs, info = getattr(transformers, name).from_pretrained(
            saved / part.folder, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            out = theirs(torch.tensor(ids))
        out = out.pooler_output if field == "clip" else out.last_hidden_state
        here = module(field, getattr(PRESET, field))(jnp.asarray(ids))
        np.testing.assert_allclose(here, out.numpy(), rtol=0, atol=1e-5)
