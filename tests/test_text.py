"""T5, CLIP and the tokenizers: laws, and parity with transformers (stored and live)."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import T5Tokenizer

from vcloze_jax.config import MINI, CLIPConfig, T5Config, UserError
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder, relative_buckets
from vcloze_jax.storage.textreader import Tokenizers, load_tokenizer

FIXTURE = Path(__file__).parent / "data/text.safetensors"  # scripts/fixtures_text.py describes it
MINI_FOLDER = Path(__file__).parents[1] / "vcloze_jax/mini"
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


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers(MINI_FOLDER, MINI.t5, MINI.clip)


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


def test_tokens_are_those_of_transformers(tokenizers):
    """Cutting and padding equal `truncation=True, padding="max_length"`, and the cut is counted."""
    prompts = ["", "A", "A", "a row " * 90]
    t5_ids, clip_ids, unread = tokenizers(prompts)
    for ours, one, n in ((t5_ids, tokenizers.t5, 96), (clip_ids, tokenizers.clip, 77)):
        kind = dict(truncation=True, padding="max_length", max_length=n)
        assert ours.dtype == np.int32 and ours.shape == (4, n)
        np.testing.assert_array_equal(ours, one(prompts, **kind)["input_ids"])
        np.testing.assert_array_equal(ours[1], ours[2])
        assert ours[3, -1] == one.eos_token_id
    dropped = [of["dropped_tokens"] for of in unread]
    assert dropped[:3] == [{"t5": 0, "clip": 0}] * 3
    assert dropped[3] == {"t5": 180 + 1 - 96, "clip": 180 + 2 - 77}


def test_unknown_characters(tokenizers):
    """The characters that no token stands for are counted, of each encoder: none of English, all of
    Chinese in T5's words, none in CLIP's bytes; blanks, and the end token that CLIP takes for the
    unknown one, do not count, and also what lies behind the cut does."""
    for prompt, count in {
        "": 0,
        "A red fox — “quoted” jabberwock, naïve": 0,
        "一只狐狸": 4,
        "a red 一只 fox 狐狸!": 4,
        "fox 🦊": 1,
        "a row " * 90 + "狐狸": 2,
    }.items():
        *_, (unread,) = tokenizers([prompt])
        assert unread["unknown_characters"] == {"t5": count, "clip": 0}, prompt


def test_mini_tokenizers_know_every_english_text(tokenizers):
    """Bytes (CLIP) and characters (T5) catch what the words do not; the ids are the config's."""
    text = "Zoë’s naïve — “quoted” jabberwock costs £5.00 & 37% (half-price); {x|y} ~ @home #1!"
    assert tokenizers.t5.unk_token_id not in tokenizers.t5(text)["input_ids"]
    assert tokenizers.clip.eos_token_id not in tokenizers.clip("日本 😀" + text)["input_ids"][:-1]
    assert tokenizers.t5.all_special_ids == [1, 2, 0]
    assert (len(tokenizers.t5), len(tokenizers.clip)) == (MINI.t5.vocab, MINI.clip.vocab)


def test_wrong_tokenizers_are_refused(tmp_path):
    """A missing, broken or foreign tokenizer is the user's error, named with its folder."""
    with pytest.raises(UserError, match="tokenizer_2: no spiece.model or tokenizer.json"):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)
    with pytest.raises(UserError, match=f"tokenizer_2: {MINI.t5.vocab} tokens"):
        Tokenizers(MINI_FOLDER, replace(MINI.t5, vocab=100), MINI.clip)
    with pytest.raises(UserError, match=f"the end token is {MINI.clip.eos}"):
        Tokenizers(MINI_FOLDER, MINI.t5, replace(MINI.clip, eos=5))
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_2/tokenizer.json: is not JSON at column 2"):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)
    shutil.copytree(MINI_FOLDER / "tokenizer_2", tmp_path / "tokenizer_2", dirs_exist_ok=True)
    shutil.copytree(MINI_FOLDER / "tokenizer", tmp_path / "tokenizer")
    config = tmp_path / "tokenizer/tokenizer_config.json"
    plain = config.read_bytes()
    config.write_bytes(b"\xef\xbb\xbf" + plain)
    with pytest.raises(
        UserError, match="tokenizer/tokenizer_config.json: begins with a byte order"
    ):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)
    config.write_bytes(plain)
    (tmp_path / "tokenizer/merges.txt").unlink()
    with pytest.raises(UserError, match="tokenizer: not a tokenizer .vocab.json: .*merges"):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_tokenizers_that_pad_or_cut_on_the_left_are_refused(tmp_path, part, side):
    """What tokenizer_config.json says and would change the tokens is obeyed or refused by name."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINI_FOLDER / name, tmp_path / name)
    file = tmp_path / part / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {side: "left"}))
    with pytest.raises(UserError, match=f"{part}/tokenizer_config.json: {side} is 'left'"):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)


@pytest.mark.parametrize("key", ["padding", "truncation"])
def test_the_file_that_says_left_is_named(tmp_path, key):
    """tokenizer.json holds where the config is silent, and is then the one to mend."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(MINI_FOLDER / name, tmp_path / name)
    file = tmp_path / "tokenizer_2/tokenizer.json"
    how = {
        "padding": dict(strategy="BatchLongest", pad_to_multiple_of=None, pad_id=0, pad_type_id=0),
        "truncation": dict(max_length=12, strategy="LongestFirst", stride=0),
    }[key] | {"direction": "Left"}
    how |= {"pad_token": "<pad>"} if key == "padding" else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: how}))
    with pytest.raises(UserError, match=rf"tokenizer.json: {key}.direction is 'left'"):
        Tokenizers(tmp_path, MINI.t5, MINI.clip)


def test_tokenizers_without_their_config(tokenizers, tmp_path):
    """What tokenizer_config.json repeats of the vocabulary's files may be absent."""
    for name in ("tokenizer", "tokenizer_2"):
        ignored = shutil.ignore_patterns("tokenizer_config.json", "special_tokens_map.json")
        shutil.copytree(MINI_FOLDER / name, tmp_path / name, ignore=ignored)
    prompts = ["", "A fox, painted <extra_id_5>.", "a row " * 90]
    bare = Tokenizers(tmp_path, MINI.t5, MINI.clip)
    for ours, theirs in zip(bare(prompts)[:2], tokenizers(prompts)[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_sentencepiece_model_alone(tmp_path, monkeypatch):
    """A T5 tokenizer that is spiece.model alone names the package that reads it, where that is not
    installed; with it, it is read, pad, end and unknown first and a hundred sentinels last."""
    (tmp_path / "spiece.model").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(UserError, match="spiece.model .*: pip install sentencepiece, or"):
            load_tokenizer(T5Tokenizer, tmp_path, 180)
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"a fox and {n} quick brown dogs" for n in range(3000)),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(T5Tokenizer, tmp_path, 140)
    assert len(tokenizer) == 140 and tokenizer.all_special_ids[:3] == [1, 2, 0]
    assert tokenizer.decode(tokenizer("quick fox")["input_ids"]) == "quick fox</s>"


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
