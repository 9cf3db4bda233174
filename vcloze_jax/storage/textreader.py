"""Prompts -> what the MMDiT reads of them: tokenizers, text encoders, and a memory on disk.

A prompt that was read once needs no text encoder, nor its 10 GB.
"""

import os
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vcloze_jax import conditioning
from vcloze_jax.config import CLIPConfig, T5Config, UserError
from vcloze_jax.inputs.checks import describe_error, error_context, parse_json
from vcloze_jax.ports.diagnose import say_fetch
from vcloze_jax.programs import timed
from vcloze_jax.sharding import on_host
from vcloze_jax.storage.arraystore import ArrayStore

LIMIT = 256  # files, 1 GiB of FLUX's; the oldest go first


class Text(NamedTuple):
    """One prompt as the MMDiT reads it."""

    txt: np.ndarray  # [T, text_width]
    pooled: np.ndarray  # [vec_width]
    unread: dict[str, dict[str, int]]  # "dropped_tokens", "unknown_characters": {encoder: count}
    seconds: Counter  # "load" and "text", nothing where it was remembered


class TextReader:
    """Reads prompts one at a time, so that none depends on the others.

    `load_encoders()` -> (T5Encoder, CLIPTextEncoder) is called when a prompt is new, and what it
    gives is held no longer than the reading lasts. `cache` is a TextCache, a TextMemory, a
    GridCache, which has all of them, or None where weights change under it.
    """

    def __init__(self, tokenizers, load_encoders, dtype, cache=None):
        self.tokenizers, self.load_encoders, self.cache = tokenizers, load_encoders, cache
        self.encode = jax.jit(partial(conditioning.encode_text, dtype=dtype))

    def __call__(self, prompts: list[str]) -> dict[str, Text]:
        """Prompt -> Text."""
        prompts = list(dict.fromkeys(prompts))
        encoders, texts = (), {}
        for prompt, *ids, unread in zip(prompts, *self.tokenizers(prompts), strict=True):
            ids, seconds = tuple(row[None] for row in ids), Counter()
            embeddings = None if self.cache is None else self.cache.read(ids)
            if embeddings is None:
                with timed(seconds, "load"):
                    encoders = encoders or self.load_encoders()
                with timed(seconds, "text"):
                    encoded = self.encode(*encoders, *ids)
                    embeddings = [x[0] for x in on_host(encoded)]
                if self.cache is not None:
                    self.cache.write(ids, embeddings)
            texts[prompt] = Text(*embeddings, unread, seconds)
        return texts


class TextMemory(dict):
    """What was read, while the process lives: of encoders that stay as they are."""

    def read(self, ids):
        return self.get(tuple(row.tobytes() for row in ids))

    def write(self, ids, embeddings):
        self[tuple(row.tobytes() for row in ids)] = embeddings


class TextStore(ArrayStore):
    """Embeddings of one pair of text encoders by token ids, as TextReader has both."""

    def __init__(self, folder: Path, identity: str):
        super().__init__(folder, identity, ("txt", "pooled"))


class TextCache(TextStore):
    """Those of the prompts that were first painted last, as far as the disk allows."""

    def write(self, ids, embeddings):
        with suppress(OSError, UserError):  # no room, or not ours to write: it is a help, no more
            super().write(ids, embeddings)
            files = sorted(self.folder.iterdir(), key=lambda f: f.stat().st_mtime)
            for old in files[:-LIMIT]:
                old.unlink(missing_ok=True)


class Tokenizers:
    """Prompts to token ids, with the two tokenizers of a weights folder laid out as FLUX's.

    `folder` holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5); nothing is downloaded. Raises
    UserError if one is missing, unreadable, or not that of the text encoder: JAX clamps an id
    beyond the vocabulary to its last row and would never say so.
    """

    def __init__(self, folder: Path, t5: T5Config, clip: CLIPConfig):
        # It says at import that torch is missing, which is as intended.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import CLIPTokenizer, T5Tokenizer  # slow to import

        self.t5 = load_tokenizer(T5Tokenizer, Path(folder) / "tokenizer_2", t5.vocab)
        self.clip = load_tokenizer(CLIPTokenizer, Path(folder) / "tokenizer", clip.vocab)
        self.t5_length, self.clip_length = t5.max_length, clip.max_length
        if self.clip.eos_token_id != clip.eos:
            raise UserError(
                f"{folder}/tokenizer: the end token is {self.clip.eos_token_id}, but the text "
                f"encoder pools at {clip.eos}; take both from one model"
            )

    def __call__(self, prompts: list[str]):
        """-> T5 ids int32 [B, T5 max_length], CLIP ids int32 [B, CLIP max_length], unread.

        Too long a prompt loses its last words but keeps its end token; a short one is padded on the
        right. What is not read of each prompt is {"dropped_tokens": {"t5": n, "clip": n},
        "unknown_characters": …}, the second for characters that no token stands for.
        """
        t5_ids, t5_unread = tokenize(self.t5, prompts, self.t5_length)
        clip_ids, clip_unread = tokenize(self.clip, prompts, self.clip_length)
        unread = [
            {reason: {"t5": t5[reason], "clip": clip[reason]} for reason in t5}
            for t5, clip in zip(t5_unread, clip_unread, strict=True)
        ]
        return t5_ids, clip_ids, unread


def load_tokenizer(cls, folder, vocab):
    """A tokenizer of `transformers` from its folder, never from the network; see Tokenizers."""
    known = cls.vocab_files_names.values()
    names = [name for name in known if (folder / name).is_file()]
    if not names:  # transformers would make an empty tokenizer and say nothing
        files = " or ".join(known)
        remedy = f"take the folder from the model that you load{say_fetch(folder)}"
        raise UserError(f"{folder}: no {files}; {remedy}")
    if names == ["spiece.model"] and find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder}: spiece.model is read with sentencepiece: pip install sentencepiece, or put "
            "the tokenizer.json of the same model beside it"
        )
    # Without a config T5Tokenizer adds a hundred tokens to those that tokenizer.json lists.
    bare = "tokenizer.json" in names and not (folder / "tokenizer_config.json").is_file()
    options = {"extra_ids": 0} if bare and cls.__name__.startswith("T5") else {}
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        for file in sorted(folder.glob("*.json")):
            with error_context(file):
                parse_json(file.read_bytes())
        reason = f"{' and '.join(names)}: {describe_error(error)}"
        raise UserError(f"{folder}: not a tokenizer ({reason}); fetch it again") from error
    check_sides(tokenizer, folder)
    if len(tokenizer) > vocab:
        raise UserError(
            f"{folder}: {len(tokenizer)} tokens, but the text encoder knows {vocab}; "
            "take both from one model"
        )
    return tokenizer


def check_sides(tokenizer, folder):
    """Raise UserError where a prompt would be padded or cut on the left, naming the file that says
    so: transformers asks tokenizer.json where the config is silent."""
    for what in ("padding", "truncation"):
        if (side := getattr(tokenizer, f"{what}_side")) != "right":
            file, key = folder / "tokenizer_config.json", f"{what}_side"
            if not file.is_file() or key not in parse_json(file.read_bytes()):
                file, key = folder / "tokenizer.json", f"{what}.direction"
            remedy = "say 'right', as FLUX's own tokenizers do"
            raise UserError(f"{file}: {key} is {side!r}, only 'right' can be read; {remedy}")


def tokenize(tokenizer, prompts, length):
    """-> ids int32 [B, length], and of each prompt what is not in them: how many tokens were cut,
    and how many characters stand behind the unknown token."""
    encoded = tokenizer(prompts, verbose=False, return_offsets_mapping=True)
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    unread = []
    for i in range(len(prompts)):
        row, spans = encoded["input_ids"][i], encoded["offset_mapping"][i]
        cut = row if len(row) <= length else [*row[: length - 1], row[-1]]
        ids[i, : len(cut)] = cut
        # CLIP's unknown token is its end token, which stands for the characters 0 to 0.
        unknown = [
            span for span, id in zip(spans, row, strict=True) if id == tokenizer.unk_token_id
        ]
        characters = sum(stop - start for start, stop in unknown)
        unread.append({"dropped_tokens": len(row) - len(cut), "unknown_characters": characters})
    return ids, unread
