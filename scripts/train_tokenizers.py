"""Train the tokenizers of mini on its own sentences: `python scripts/train_tokenizers.py`.

Writes vcloze_jax/mini/tokenizer (CLIP's pipeline: lower case, byte-level BPE) and
vcloze_jax/mini/tokenizer_2 (T5's: Unigram, an end token and no start token), in the layout of
FLUX's folders, so that `transformers` loads them as it loads those. To CLIP every word of the
templates is one token, to T5 every stretch of them between what is filled in, so that no sentence
of training has more than 32; any other text falls back to bytes (CLIP) or characters (T5).
"""

import json
import random
import re
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from vcloze_jax.config import MINI
from vcloze_jax.data.graph import NODE_PHRASES
from vcloze_jax.data.graphemoji import read_subjects
from vcloze_jax.inputs import prompts

MINI_FOLDER = Path(__file__).parents[1] / "vcloze_jax/mini"
# Beyond ASCII: letters of western Europe and what editors make of quotes, dashes and dots.
CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 256))] + list("‘’“”–—…•€™œŒ")
START, SPACE = "▁", "␣"  # of a text, as T5Tokenizer marks it; and what becomes of spaces within
T5_LENGTH = 32  # tokens: no sentence of training or of evaluate has more


def main():
    sentences = corpus(sorted(set(read_subjects("train").names)), random.Random(0))
    train_clip(sentences, MINI.clip.vocab, MINI_FOLDER / "tokenizer")
    train_t5(sentences, MINI.t5.vocab, MINI_FOLDER / "tokenizer_2")


def corpus(names, rng):
    """Every name a few times, and ten thousand prompts as training and users write them."""
    kinds = [phrase for phrases in NODE_PHRASES.values() for phrase in phrases]
    kinds += prompts.PHRASES.values()
    sentences = 4 * names
    for _ in range(10_000):
        rows, columns = rng.randint(1, 3), rng.randint(2, 4)
        layout = prompts.layout_prompt(rows, columns, rng.randrange(10))
        task = prompts.task_prompt(rng.sample(kinds, columns), rng.randrange(10))
        content = rng.choice(prompts.CONTENT_PREFIXES) + rng.choice(names)
        sentences.append(prompts.join(layout, task, content))
    return sentences


def train_clip(sentences, vocab, folder):
    """BPE over bytes; ids in CLIP's order: bytes, bytes that end a word, merges, start, end.

    The end token has the highest id, so that both rules of transformers pool at the same place
    (first end token, or highest id where a config says eos_token_id 2).
    """
    like = CLIPTokenizer().backend_tokenizer
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [byte + "</w>" for byte in alphabet]
    words = Counter((*word[:-1], word[-1] + "</w>") for word in split(sentences, like))
    merges = learn(words, vocab - len(alphabet) - len(special))
    tokens = dict.fromkeys([*alphabet, *map("".join, merges), *special.values()])
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    special |= dict(unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    write_config(folder, "CLIPTokenizer", special, model_max_length=MINI.clip.max_length)


def train_t5(sentences, vocab, folder):
    """Unigram with T5's ids: pad 0, end 1, unknown 2. Its pieces are phrases and words.

    The words are learned as BPE: a Unigram trainer wants more text than there is. Their nearly
    equal scores make of every text the fewest pieces possible, of these the most frequent.
    """
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    words = Counter((SPACE, *word) for text in sentences for word in text.split())
    merges = map("".join, learn(words, vocab))
    pieces = dict.fromkeys([START, SPACE, *CHARACTERS, *stretches(), *merges])
    pieces = list(pieces)[: vocab - len(special)]
    scores = [(piece, round(-10 - i / vocab, 3)) for i, piece in enumerate(pieces)]
    scores = [(token, 0.0) for token in special.values()] + scores
    options = dict(extra_ids=0, _spm_precompiled_charsmap=space_map())
    tokenizer = T5Tokenizer(vocab=scores, **options, **special).backend_tokenizer
    write(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_config(folder, "T5Tokenizer", special, model_max_length=T5_LENGTH, extra_ids=0)


def stretches():
    """What stands between the slots of the templates, and what kinds of pictures are called, each
    with the space before it; of a template's first also as a text begins with it."""
    templates = prompts.LAYOUTS + prompts.TASK_SENTENCES
    for template in templates + prompts.CONTENT_PREFIXES + prompts.EDITING_PREFIXES:
        first, *others = (part.rstrip() for part in re.split(r"\{\w\}", template))
        parts = [f"{START}{first}", f" {first}", *others]
        yield from (part.replace(" ", SPACE) for part in parts if part)
    yield from (f"{START}{count}" for count in range(1, 13))
    yield from (f",{SPACE}[IMAGE{i}]" for i in range(2, 5))
    phrases = prompts.PHRASES | prompts.RESTORATIONS
    for phrase in (*sum(NODE_PHRASES.values(), ()), *phrases.values()):
        yield f" {phrase}".replace(" ", SPACE)


def space_map():
    """The normaliser " " -> SPACE, as sentencepiece compiles its own: T5Tokenizer parts a text at
    its spaces, and no piece would span two words.

    A trie of bytes in an array (darts-clone): the unit at 0x20 is the child of the root by that
    byte and has a leaf, 1 further by XOR, whose value is an offset into the replacements.
    """
    units = [0] * 256
    units[0x20] = 1 << 10 | 1 << 8 | 0x20  # offset of the leaf, that there is one, label
    trie = struct.pack("<256I", *units)
    return struct.pack("<I", len(trie)) + trie + f"{SPACE}\0".encode()


def split(sentences, like):
    """The words of all sentences, cut and spelled as the tokenizer `like` does."""
    for text in sentences:
        text = like.normalizer.normalize_str(text) if like.normalizer else text
        yield from (word for word, _ in like.pre_tokenizer.pre_tokenize_str(text))


def learn(words, count):
    """Merges of BPE until they made `count` tokens; words counts tuples of symbols.

    Our own ten lines, since the trainer of `tokenizers` breaks ties differently in every run.
    """
    merges, tokens = [], set()
    while len(tokens) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens.add("".join(best))  # another pair may make the same token
        words = Counter({merge(word, best): n for word, n in words.items()})
    return merges


def merge(word, pair):
    """`word` with every occurrence of `pair`, from the left, joined into one symbol."""
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def write_config(folder, name, special, **config):
    write(folder / "special_tokens_map.json", special)
    write(folder / "tokenizer_config.json", dict(tokenizer_class=name, **special, **config))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
