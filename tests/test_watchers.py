"""Laws of what watches a run: it hears every step once, and traces those that were asked for."""

import gzip
import json
import struct

import jax
import jax.numpy as jnp
import pytest

from vcloze_jax.watchers import Profile, tell_tensorboard


def read_scalars(folder):
    """(name, value, step) of all that TensorBoard would be told; records of TFRecord files."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            yield from ((v.tag, v.simple_value, event.step) for v in event.summary.value)
            data = data[16 + size :]


def test_tensorboard(tmp_path):
    """Scalars of a step are written while it listens; others, and what is said later, are not."""
    pytest.importorskip("tensorboardX")
    with tell_tensorboard(tmp_path, 4):
        jax.monitoring.record_scalar("/vcloze_jax/train/loss", 0.5, step=5)
        jax.monitoring.record_scalar("/jax/other", 7)
    jax.monitoring.record_scalar("/vcloze_jax/train/loss", 0.25, step=6)
    assert list(read_scalars(tmp_path)) == [("train/loss", 0.5, 5)]


@pytest.mark.parametrize(
    "count, sent, traced", [(0, 8, []), (2, 8, [7, 8]), (5, 4, [7, 8]), (1, 2, [])]
)
def test_profile(tmp_path, count, sent, traced):
    """The steps that were asked for are traced, from the third of this process, each under its
    number; a run that ends before has those that it did, or no trace at all."""
    profile, work = Profile(tmp_path / "profile", count, begun=4), jax.jit(jnp.sin)
    for step in range(5, 5 + sent):
        with profile.annotate(step):
            work(jnp.ones(4)).block_until_ready()
        profile.note_end(step)
    profile.close()
    files = list(tmp_path.rglob("*.trace.json.gz"))
    assert len(files) == bool(traced)
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
        assert sorted(map(int, steps)) == traced
