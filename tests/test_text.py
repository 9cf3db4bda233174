"""T5 and CLIP: laws, and parity with transformers (stored and live)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from vcloze_jax.config import CLIPConfig, T5Config
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder, relative_buckets

FIXTURE = Path(__file__).parent / "data/text.safetensors"  # scripts/fixtures_text.py describes it
T5 = T5Config(vocab=24, width=8, head_dim=4, heads=3, mlp=12, layers=2, buckets=8, max_distance=9)
CLIP = CLIPConfig(vocab=24, width=8, heads=2, mlp=12, layers=2, max_length=12, eos=23)

# Our module -> its name in transformers; {} is the layer.
BLOCK, LAYER = "encoder.block.{}.layer.", "encoder.layers.{}."
T5_NAMES = {
    "embed": "shared",
    "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "blocks/norm1": BLOCK + "0.layer_norm",
    "blocks/norm2": BLOCK + "1.layer_norm",
    **{f"blocks/{x}": f"{BLOCK}0.SelfAttention.{x}" for x in "qkvo"},
    **{f"blocks/{x}": f"{BLOCK}1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")},
    "norm": "encoder.final_layer_norm",
}
CLIP_NAMES = {
    "embed": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding",
    "blocks/norm1": LAYER + "layer_norm1",
    "blocks/norm2": LAYER + "layer_norm2",
    **{f"blocks/{x}": f"{LAYER}self_attn.{x}_proj" for x in "qkv"},
    "blocks/o": LAYER + "self_attn.out_proj",
    **{f"blocks/{x}": f"{LAYER}mlp.{x}" for x in ("fc1", "fc2")},
    "norm": "final_layer_norm",
}


read = jax.jit(lambda model, ids: model(ids))


def fill(cls, config, names, weights):
    """A `cls` with the weights of transformers: kernels transposed, layers stacked."""

    def leaf(path, old):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        stem, _, kind = path.rpartition("/")
        name = names[stem or kind] + (".bias" if kind == "bias" else ".weight")
        layers = [np.asarray(weights[name.format(i)], np.float32) for i in range(T5.layers)]
        layers = [x.T for x in layers] if kind == "kernel" else layers
        new = np.stack(layers) if path.startswith("blocks/") else layers[0]
        assert new.shape == old.shape, path
        return jnp.asarray(new)

    graph, state = nnx.split(jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    new = jax.tree_util.tree_map_with_path(leaf, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, new)
    return nnx.merge(graph, state)


def cast(model, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), model)


def relative(x, reference):
    """Relative error in the Euclidean norm, as the fixture measures it."""
    x = np.asarray(x.astype(jnp.float32))
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


def part(weights, prefix):
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def stored():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def models(stored):
    return {
        "t5": fill(T5Encoder, T5, T5_NAMES, part(stored, "t5/")),
        "clip": fill(CLIPTextEncoder, CLIP, CLIP_NAMES, part(stored, "clip/")),
    }


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_float32_parity(name, models, stored):
    """Outputs equal those of transformers; 1e-5 is float32 rounding of outputs of order 1 to 4.

    The rows hold a full prompt, a padded one and the empty one; CLIP's end token sits at the
    last, an early and the second place.
    """
    ours = read(models[name], stored[f"{name}_ids"])
    np.testing.assert_allclose(ours, stored[f"{name}_out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_bfloat16_error_budget(name, models, stored):
    """Against float32, our bfloat16 is no worse than 1.5 times that of transformers."""
    ours = read(cast(models[name], jnp.bfloat16), stored[f"{name}_ids"])
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, stored[f"{name}_out"]) <= 1.5 * stored[f"{name}_bf16_error"]


def test_relative_buckets(stored):
    """Every distance up to 600 lies in the bucket where T5 was trained to find it."""
    table = relative_buckets(601, 32, 128)
    both = np.concatenate([table[600, :600], table[0]])  # distances -600 .. -1, 0 .. 600
    np.testing.assert_array_equal(both, stored["buckets"])


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_rows_are_independent(name, models, stored):
    """A batch of one is an element of a batch; 1e-5 allows another order of summation."""
    ids = stored[f"{name}_ids"]
    alone = jnp.concatenate([read(models[name], ids[i : i + 1]) for i in range(len(ids))])
    np.testing.assert_allclose(alone, read(models[name], ids), rtol=1e-5, atol=1e-5)


def test_clip_ignores_what_follows_the_first_end_token(models, stored):
    """CLIP is causal and pools at the first end token: later tokens, ends included, are unseen."""
    ids = stored["clip_ids"][1:2]
    end = int(np.argmax(ids[0] == CLIP.eos))
    other = ids.copy()
    other[:, end + 1 :] = np.arange(CLIP.max_length - end - 1)
    np.testing.assert_array_equal(read(models["clip"], ids), read(models["clip"], other))
    other[:, end - 1] += 1
    assert np.abs(read(models["clip"], ids) - read(models["clip"], other)).max() > 1e-2


def test_t5_attends_to_padding(models, stored):
    """T5 has no mask: the same words with fewer pads behind them read differently."""
    ids = stored["t5_ids"][1:2]
    words, fewer = read(models["t5"], ids)[:, :6], read(models["t5"], ids[:, :8])[:, :6]
    assert np.abs(words - fewer).max() > 1e-2


def test_gradients_reach_every_weight(models, stored):
    """Both encoders can be trained: no weight is cut off from the output."""
    for name, model in models.items():
        gradient = jax.jit(jax.grad(lambda model, ids: jnp.square(model(ids)).sum()))
        grads = gradient(model, stored[f"{name}_ids"])
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads) if g.ndim > 1)


def test_full_size_counts():
    """At FLUX's sizes the encoders have the parameters of T5 v1.1 XXL and CLIP ViT-L/14."""
    for cls, config, count in (
        (T5Encoder, T5Config(), 4_762_310_656),
        (CLIPTextEncoder, CLIPConfig(), 123_060_480),
    ):
        model = jax.eval_shape(lambda cls=cls, config=config: cls(config, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(model)) == count


@pytest.mark.parity
@pytest.mark.parametrize("seed", [1, 2])
def test_live_parity(seed):
    """At other weights and lengths, outputs equal those of the installed transformers."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    t5_config = hf.T5Config(
        vocab_size=24, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=9,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    clip_config = hf.CLIPTextConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=23,
    )  # fmt: skip
    ids = np.random.default_rng(seed).integers(2, 23, (3, 12))
    ids[:, seed * 4 :] = 23
    for theirs, *ours in (
        (hf.T5EncoderModel(t5_config), T5Encoder, T5, T5_NAMES),
        (hf.CLIPTextModel(clip_config), CLIPTextEncoder, CLIP, CLIP_NAMES),
    ):
        for value in theirs.eval().parameters():
            value.data = 0.5 * torch.randn(value.shape)
        ours = read(fill(*ours, theirs.state_dict()), ids)
        with torch.no_grad():
            out = theirs(torch.tensor(ids))
        out = out.last_hidden_state if ours.ndim == 3 else out.pooler_output
        np.testing.assert_allclose(ours, out.numpy(), rtol=2e-5, atol=2e-5)
