"""Train the tokenizers of mini on its own sentences: `python scripts/train_tokenizers.py`.

Writes vcloze_jax/mini/tokenizer (CLIP's pipeline: lower case, byte-level BPE) and
vcloze_jax/mini/tokenizer_2 (T5's: Unigram, an end token and no start token), in the layout of
FLUX's folders, so that `transformers` loads them as it loads those. Every word of the templates
becomes one token; any other text falls back to bytes (CLIP) or characters (T5).
"""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from vcloze_jax import prompts
from vcloze_jax.config import MINI
from vcloze_jax.data.graph import NODE_PHRASES
from vcloze_jax.data.graphemoji import read_subjects

MINI_FOLDER = Path(__file__).parents[1] / "vcloze_jax/mini"
# Beyond ASCII: letters of western Europe and what editors make of quotes, dashes and dots.
CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 256))] + list("‘’“”–—…•€™œŒ")


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
    """Unigram over words, with T5's ids: pad 0, end 1, unknown 2.

    The pieces are learned as BPE: a Unigram trainer wants more text than there is. Their nearly
    equal scores make of every word the fewest pieces possible, of these the most frequent.
    """
    like = T5Tokenizer(extra_ids=0).backend_tokenizer
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    alphabet = ["▁", *CHARACTERS]
    words = Counter(map(tuple, split(sentences, like)))
    merges = learn(words, vocab - len(alphabet) - len(special))
    pieces = dict.fromkeys([*alphabet, *map("".join, merges)])
    scores = [(piece, round(-10 - i / vocab, 3)) for i, piece in enumerate(pieces)]
    scores = [(token, 0.0) for token in special.values()] + scores
    tokenizer = T5Tokenizer(vocab=scores, extra_ids=0, **special).backend_tokenizer
    write(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_config(folder, "T5Tokenizer", special, model_max_length=MINI.t5.max_length, extra_ids=0)


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
