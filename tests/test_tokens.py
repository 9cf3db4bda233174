"""What the text encoders are given: ids of T5 and CLIP, and the tokenizers that are refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import T5Tokenizer

from vcloze_jax.config import MINI, UserError
from vcloze_jax.storage.textreader import Tokenizers, load_tokenizer

MINI_FOLDER = Path(__file__).parents[1] / "vcloze_jax/mini"


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers(MINI_FOLDER, MINI.t5, MINI.clip)


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
    of = tokenizers.t5, tokenizers.clip
    whole_t5, whole_clip = (len(one(prompts[3])["input_ids"]) for one in of)
    assert dropped[3] == {"t5": whole_t5 - 96, "clip": whole_clip - 77} and whole_t5 > 180


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
