"""Laws of the text reader: what it says is what the encoders said, remembered to the bit or not
at all."""

import ml_dtypes
import numpy as np
import pytest

from vcloze_jax.storage import textreader
from vcloze_jax.storage.textreader import TextCache, TextReader

IDS = {"a b": ([1, 2, 3], [4, 5]), "c": ([1, 2, 7], [4, 5])}


def tokenizers(prompts):
    t5, clip = (np.int32([IDS[prompt][i] for prompt in prompts]) for i in (0, 1))
    return t5, clip, [{"dropped_tokens": {"t5": 0, "clip": len(prompt)}} for prompt in prompts]


class Encoders:
    """Say numbers that depend on the ids, and count how often they are loaded and asked."""

    def __init__(self, dtype="float32"):
        self.loads, self.calls, self.dtype = 0, 0, dtype

    def load(self):
        self.loads += 1
        return "t5", "clip"

    def encode(self, t5, clip, t5_ids, clip_ids):
        assert (t5, clip) == ("t5", "clip")
        self.calls += 1
        rng = np.random.default_rng(np.concatenate([t5_ids[0], clip_ids[0]]))
        return [rng.standard_normal((1, *s)).astype(self.dtype) for s in ((3, 4), (5,))]


def reader(encoders, folder=None, identity="a"):
    cache = None if folder is None else TextCache(folder, identity)
    reader = TextReader(tokenizers, encoders.load, encoders.dtype, cache)
    reader.encode = encoders.encode
    return reader


def same(ours, theirs):
    pairs = [(ours[p], theirs[p]) for p in theirs]
    return ours.keys() == theirs.keys() and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for a, b in pairs
        for x, y in ((a.txt, b.txt), (a.pooled, b.pooled))
    )


def test_read_once():
    """Prompts are read one by one, each once, by encoders that are loaded once a reading; what a
    prompt loses is told."""
    encoders = Encoders()
    texts = reader(encoders)(["a b", "c", "a b"])
    assert (encoders.loads, encoders.calls) == (1, 2) and list(texts) == ["a b", "c"]
    assert texts["a b"].unread == {"dropped_tokens": {"t5": 0, "clip": 3}}
    assert same({"c": texts["c"]}, reader(Encoders())(["c"]))


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_remembered(tmp_path, dtype):
    """Asked again, also by another process, no encoder is loaded and the bits are the same."""
    encoders = Encoders(dtype)
    first, again = (reader(encoders, tmp_path / "text")(["a b"]) for _ in range(2))
    assert (encoders.loads, encoders.calls) == (1, 1)
    assert same(first, again) and same(first, reader(Encoders(dtype))(["a b"]))
    assert not again["a b"].seconds


def test_key(tmp_path):
    """Another identity of the encoders or another id is another entry."""
    encoders = Encoders()
    for identity in ("a", "b"):
        for prompt in IDS:
            assert same(
                reader(encoders, tmp_path, identity)([prompt]), reader(Encoders())([prompt])
            )
    assert encoders.calls == 4 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "last bit", "longer", "folder"])
def test_damaged(tmp_path, damage):
    """A damaged file is computed anew, and where that is possible written anew."""
    encoders = Encoders()
    read = reader(encoders, tmp_path)
    said = read(["c"])
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= damage == "flipped"
    content[-1] ^= damage == "last bit"
    changed = {"empty": b"", "cut": content[:-4], "longer": content + b"1234"}
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(changed.get(damage, content))
    assert same(read(["c"]), said) and encoders.calls == 2
    assert same(read(["c"]), said) and encoders.calls == 2 + (damage == "folder")
    assert not list(tmp_path.glob(".*"))


def test_nowhere_to_write(tmp_path):
    """Without a place for it, nothing is remembered and nothing is said."""
    (tmp_path / "file").touch()
    encoders = Encoders()
    read = reader(encoders, tmp_path / "file/text")
    assert same(read(["c"]), read(["c"])) and encoders.calls == 2


def test_limit(tmp_path, monkeypatch):
    """The oldest files go first."""
    monkeypatch.setattr(textreader, "LIMIT", 2)
    for identity in "abcd":
        reader(Encoders(), tmp_path, identity)(["c"])
    assert len(list(tmp_path.iterdir())) == 2


def test_memory():
    """Within a process, encoders that stay as they are read a prompt once, with the same bits."""
    encoders = Encoders()
    read = reader(encoders)
    read.cache = textreader.TextMemory()
    assert same(read(["a b", "c"]), read(["c", "a b"])) and (encoders.loads, encoders.calls) == (
        1,
        2,
    )
