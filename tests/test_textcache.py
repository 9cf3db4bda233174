"""Laws of the cache of text embeddings: what it says is what the encoders said, or nothing."""

import ml_dtypes
import numpy as np
import pytest

from vcloze_jax.storage import textreader as textcache
from vcloze_jax.storage.textreader import TextCache

SHAPES = [(3, 4), (5,)]
IDS = np.int32([[1, 2, 3]]), np.int32([[4, 5]])


class Encoder:
    """Says numbers that depend on the ids, and counts how often it is asked."""

    def __init__(self, dtype="float32"):
        self.calls, self.dtype = 0, dtype

    def __call__(self, t5_ids, clip_ids):
        self.calls += 1
        rng = np.random.default_rng(np.concatenate([t5_ids[0], clip_ids[0]]))
        return [rng.standard_normal(shape).astype(self.dtype) for shape in SHAPES]


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_remembered(tmp_path, dtype):
    """Asked again, also by another process, the encoder is not called and the bits are the same."""
    encoder = Encoder(dtype)
    first = TextCache(tmp_path / "text", "a", SHAPES, dtype)(encoder, *IDS)
    again = TextCache(tmp_path / "text", "a", SHAPES, dtype)(encoder, *IDS)
    assert encoder.calls == 1 and same(first, again) and same(first, Encoder(dtype)(*IDS))


def test_key(tmp_path):
    """Another identity of the encoders or another id is another entry."""
    encoder = Encoder()
    for identity in ("a", "b"):
        for t5_id in (3, 7):
            ids = np.int32([[1, 2, t5_id]]), IDS[1]
            said = TextCache(tmp_path, identity, SHAPES, "float32")(encoder, *ids)
            assert same(said, Encoder()(*ids))
    assert encoder.calls == 4 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "longer", "folder"])
def test_damaged(tmp_path, damage):
    """A damaged file is computed anew, and where that is possible written anew."""
    encoder, cache = Encoder(), TextCache(tmp_path, "a", SHAPES, "float32")
    said = cache(encoder, *IDS)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= damage == "flipped"
    changed = {"empty": b"", "cut": content[:-4], "longer": content + b"1234"}
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(changed.get(damage, content))
    assert same(cache(encoder, *IDS), said) and encoder.calls == 2
    assert same(cache(encoder, *IDS), said) and encoder.calls == 2 + (damage == "folder")
    assert not list(tmp_path.glob(".*"))


def test_nowhere_to_write(tmp_path):
    """Without a place for it, nothing is remembered and nothing is said."""
    (tmp_path / "file").touch()
    encoder, cache = Encoder(), TextCache(tmp_path / "file/text", "a", SHAPES, "float32")
    assert same(cache(encoder, *IDS), cache(encoder, *IDS)) and encoder.calls == 2


def test_limit(tmp_path, monkeypatch):
    """The oldest files go first."""
    monkeypatch.setattr(textcache, "LIMIT", 2)
    cache = TextCache(tmp_path, "a", SHAPES, "float32")
    for i in range(4):
        cache(Encoder(), np.int32([[i]]), IDS[1])
    assert len(list(tmp_path.iterdir())) == 2
