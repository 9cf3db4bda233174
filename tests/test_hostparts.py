"""Laws of what a run of several hosts is made of: they find each other, agree, bring their own."""

import jax.numpy as jnp
from hostpair import ends, start_pair

from vcloze_jax.storage import checkpoint, digests

PARTS = """
import sys
from pathlib import Path
import jax, numpy as np
from vcloze_jax import hosts
from vcloze_jax.config import Recipe, UserError
from vcloze_jax.devices import make_mesh, parse_mesh, put
from vcloze_jax.inputs import cli
from vcloze_jax.sharding import on_host, spread
from vcloze_jax.storage import checkpoint, digests

def main(argv):
    mesh = make_mesh(parse_mesh("2"))
    me, folder = jax.process_index(), Path(argv[0])
    assert jax.process_count() == 2 and jax.local_device_count() == 1 and mesh.size == 2

    assert hosts.tell_all(f"I am {me}") == ["I am 0", "I am 1"]
    for mistaken in (0, 1):
        try:
            with hosts.agreed():
                if me == mistaken:
                    raise UserError(f"of {mistaken}")
        except UserError as error:
            assert str(error) == f"of {mistaken}"
        else:
            raise AssertionError
    poll = hosts.Poll(mesh)
    assert [poll(143 * (me == 1)), poll(0), poll(2 * (me == 0)), poll(0)] == [0, 143, 0, 2]

    drawn = hosts.drawn_here(Recipe(group=8, micro_batch=4), mesh)
    assert drawn == ([0, 1, 4, 5], [2, 3, 6, 7])[me]
    rows = [np.full(3, i, np.int32) if i in drawn else None for i in range(4)]
    batch = spread(rows, mesh)
    assert not batch.is_fully_addressable
    assert on_host(batch).tolist() == [[i] * 3 for i in range(4)]

    kernel = np.arange(8, dtype=np.float32).reshape(4, 2)
    state = put({"kernel": kernel, "bias": np.ones(3, np.float32)}, mesh, "flux/")
    digested, digest = [], digests.digest_bytes
    digests.digest_bytes = lambda x: digested.append(x.shape) or digest(x)
    checkpoint.save(folder, 5, state)
    step, again = checkpoint.resume(folder, jax.tree.map(lambda x: x * 0, state))
    assert sorted(digested) == [(2, 2), (2, 2), (3,), (3,)], digested  # its own, at both ends
    assert step == 5 and again["kernel"].sharding == state["kernel"].sharding
    for ours, theirs in zip(*map(jax.tree.leaves, map(on_host, (state, again)))):
        assert np.array_equal(ours, theirs)
    print("host", me, file=sys.stderr)
    print("spoken")

cli.run(main)
"""


def test_two_processes(tmp_path):
    """Two hosts find each other; each hears what the other says, and has its mistakes; each brings
    its own rows to a batch, and digests its own part of an array; a checkpoint of both is one that
    a process alone reads."""
    codes, outs, errors = ends(start_pair([tmp_path], (PARTS, PARTS)))
    assert codes == [0, 0], errors
    assert "host 0" in errors[0] and "host 1" in errors[1]
    assert "spoken" in outs[0] and "spoken" not in outs[1]
    like = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(3)}
    step, state = checkpoint.restore(tmp_path, like)
    assert step == 5 and state["kernel"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_hosts_digest_as_much_as_each_other():
    """Hosts take files in turn, in an order in which each host's large one lies beside the others':
    so none has all of these to read."""
    large = [f"state/ocdbt.process_{i}/d/{name}" for i, name in enumerate(("0f", "f0"))]
    names = [*large, "state/d/77", *(f"state/ocdbt.process_{i}/manifest.ocdbt" for i in (0, 1))]
    ordered = sorted(names, key=digests.by_name)
    for share in (ordered[::2], ordered[1::2]):
        assert len({*share}.intersection(large)) == 1
