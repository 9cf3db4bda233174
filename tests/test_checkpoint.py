"""Laws of the checkpoints: nothing lost, nothing altered, nothing half, nothing silent."""

import gc
import os
import random
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import abstract, assert_equal, make_sharding, make_state

from vcloze_jax.config import UserError
from vcloze_jax.storage import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with steps 1 and 2, and their states. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    states = {step: make_state(step) for step in (1, 2)}
    for step, state in states.items():
        checkpoint.save(folder, step, state)
    return folder, states


def test_round_trip(finished):
    """restore(save(x)) = x to the bit, in optax's own types, and nothing is written to stderr."""
    folder, states = finished
    step, state = checkpoint.restore(folder, abstract(states[2]))
    assert step == checkpoint.latest(folder) == 2
    assert isinstance(state[1][1][0], optax.ScaleByAdamState)
    assert_equal(state, states[2])


def test_another_mesh(tmp_path):
    """8 devices -> 4 x 2 -> 1: each restore lies as `like` says and has the bits of the first."""
    first = state = make_state(0)
    for step, axes in enumerate([(4, 2), (1,)]):
        checkpoint.save(tmp_path, step, state)
        sharding = make_sharding(*axes)
        _, state = checkpoint.restore(tmp_path, abstract(state, sharding))
        assert state[0]["double"]["lora_a"].sharding == sharding
        assert_equal(state, first)


def test_never_two_states(tmp_path, monkeypatch):
    """Who takes up a step lets go of the state it had before a byte is read; where there is none to
    read, it stays."""
    *given, _ = make_state(2)  # all but what NumPy holds
    leaves, restore = jax.tree.leaves(given), checkpoint.restore

    def read(*args):
        assert all(leaf.is_deleted() for leaf in leaves)
        return restore(*args)

    monkeypatch.setattr(checkpoint, "restore", read)
    assert checkpoint.resume(tmp_path, given) == (0, given)
    checkpoint.save(tmp_path, 2, given)
    step, state = checkpoint.resume(tmp_path, given)
    assert step == 2
    assert_equal(state, list(make_state(2)[:2]))


def test_hosts_with_disks_of_their_own(tmp_path, monkeypatch):
    """Hosts that do not see the same steps are told so: none takes up one alone."""
    other = "True [1]"
    monkeypatch.setattr(checkpoint, "tell_all", lambda text: [text, other])
    with pytest.raises(UserError, match="hosts find different things there; give all one file"):
        checkpoint.resume(tmp_path, jnp.zeros(3))


def test_axes_that_were_one(tmp_path):
    """Arrays of which neighbouring axes, but for the first, were one are taken up with today's, bit
    for bit, where `like` says; another shape or dtype of as many numbers is refused by name."""
    sharding = make_sharding(4, 2)
    flat = {"a": jax.device_put(np.arange(16 * 24, dtype=np.float32).reshape(16, 24), sharding)}
    checkpoint.save(tmp_path, 1, flat)
    for shape in ((16, 3, 4, 2), (16, 1, 24), (16, 6, 4)):
        like = {"a": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=make_sharding(1))}
        _, state = checkpoint.restore(tmp_path, like)
        assert state["a"].sharding == like["a"].sharding
        np.testing.assert_array_equal(state["a"], np.asarray(flat["a"]).reshape(shape))
    for shape, dtype in (((24, 16), "float32"), ((2, 8, 24), "float32"), ((16, 3, 8), "int32")):
        like = {"a": jax.ShapeDtypeStruct(shape, dtype, sharding=make_sharding(1))}
        with pytest.raises(UserError, match=r"a is float32\[16, 24\], this run needs "):
            checkpoint.restore(tmp_path, like)


def test_damage_is_never_silent(finished, capsys):
    """Any flipped bit, cut or lost file: one line refuses the step, the older one is exact."""
    folder, states = finished
    rng, like = random.Random(0), abstract(states[2])
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    for trial in range(60):
        path = rng.choice([path for path in files if path.stat().st_size])
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        kind = trial % 6  # most are flips, what orbax alone does not notice
        if kind == 0:
            path.unlink()
        else:
            path.write_bytes(damaged[: rng.randrange(len(content))] if kind == 1 else damaged)
        step, state = checkpoint.restore(folder, like)
        path.write_bytes(content)
        assert step == 1
        assert_equal(state, states[1])
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: {folder}: step 2: ") and warning.count("\n") == 1
        assert path.name in warning and warning.endswith("; going back to step 1\n")
    assert checkpoint.restore(folder, like)[0] == 2


def test_array_digest(finished, monkeypatch):
    """Files intact but an array not what was saved (a fault below us): refused by its name."""
    folder, states = finished
    load = checkpoint.ocp.load

    def faulty(*args):
        arrays = load(*args)
        return arrays | {"0/double/lora_a": -arrays["0/double/lora_a"]}

    monkeypatch.setattr(checkpoint.ocp, "load", faulty)
    with pytest.raises(UserError, match="step 2: array 0/double/lora_a is not .* step 1: array"):
        checkpoint.restore(folder, abstract(states[2]))


def test_none_intact(tmp_path):
    """Checkpoints that exist but cannot be read are an error, and stay as they are."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": jnp.ones(4)})
        (tmp_path / str(step) / "digests").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="no intact checkpoint .step 2: .*; step 1: .*move the"):
        checkpoint.restore(tmp_path, {"a": jnp.ones(4)})
    assert sorted(tmp_path.rglob("*")) == before


def test_going_back(tmp_path):
    """The last `keep` steps stay; what lies after the saved step belongs to an abandoned future."""
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, {"a": jnp.full(4, step)}, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "4"]
    checkpoint.save(tmp_path, 3, {"a": jnp.full(4, 30)}, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    assert checkpoint.restore(tmp_path, {"a": jnp.ones(4, int)})[1]["a"][0] == 30


def test_leftovers(tmp_path):
    """What a killed save or removal left is no step, and `clean` removes it and nothing else."""
    assert checkpoint.latest(tmp_path / "none") is checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(4)})
    (tmp_path / "1").rename(tmp_path / "1.old.tmp")
    (tmp_path / "2.tmp" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(UserError, match="no intact checkpoint .it is empty"):
        checkpoint.restore(tmp_path, {"a": jnp.ones(4)})
    (tmp_path / "3").mkdir()
    checkpoint.clean(tmp_path)
    assert os.listdir(tmp_path) == ["3"]


@pytest.mark.parametrize(
    "like, message",
    [
        ({"a": jnp.ones(4, jnp.bfloat16)}, r"a is float32\[4\], this run needs bfloat16\[4\]"),
        ({"a": jnp.ones((2, 2))}, r"a is float32\[4\], this run needs float32\[2, 2\]"),
        ({"a": jnp.ones(4), "b": jnp.ones(())}, r"b is missing, this run needs float32\[\]"),
        ({"A": jnp.ones(4)}, r"A is missing, this run needs float32\[4\]"),
        ({}, r"a is float32\[4\], this run needs no such array"),
    ],
)
def test_mismatch(tmp_path, like, message):
    """Another type, shape or set of arrays is an error that names the array; nothing is cast."""
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(4)})
    with pytest.raises(UserError, match=message):
        checkpoint.restore(tmp_path, like)


@pytest.mark.parametrize("steps, more", [(0, 3), (1, 2), (2, 1), (5, 1)])
def test_space(tmp_path, monkeypatch, steps, more):
    """A run starts only where three checkpoints fit, which lie there while one is written, those
    that are there already counted in; all of it from the shapes alone."""
    for step in range(steps):
        (tmp_path / str(step)).mkdir()
    like = {"a": jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16)}
    usage, free = checkpoint.shutil.disk_usage(tmp_path), more * 2_000_000
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=free))
    checkpoint.check_space(tmp_path, like)
    free -= 1
    sizes = f"{2 * more}.0 MB are free, {2 * more}.0 MB more will be taken by 3 checkpoints"
    with pytest.raises(UserError, match=sizes):
        checkpoint.check_space(tmp_path, like)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/sub: cannot hold checkpoints"):
        checkpoint.check_space(tmp_path / "file" / "sub", like)


def test_what_is_said_to_be_needed_is_taken(tmp_path, monkeypatch):
    """While a third step is written, three lie there."""
    counts, write = [], checkpoint.digests.write_digests

    def count(path, arrays):
        counts.append(len(list(tmp_path.glob("*/arrays"))))
        write(path, arrays)

    monkeypatch.setattr(checkpoint.digests, "write_digests", count)
    for step in range(5):
        checkpoint.save(tmp_path, step, {"a": jnp.ones(4)})
    assert counts == [1, 2, 3, 3, 3] and checkpoint.KEPT + 1 == 3


def test_saved_is_verified(tmp_path, monkeypatch):
    """A step that the disk does not hold as it was written is refused by name before any older one
    goes, and is none."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": jnp.full(4, step)})
    write = checkpoint.digests.write_digests

    def damage(path, arrays):
        write(path, arrays)
        file = max((path / "arrays").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(checkpoint.digests, "write_digests", damage)
    for step in (2, 3):
        with pytest.raises(UserError, match=f"step {step} cannot be saved: file arrays/.* is not"):
            checkpoint.save(tmp_path, step, {"a": jnp.full(4, 9)})
        assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    step, state = checkpoint.restore(tmp_path, {"a": jnp.full(4, 0)})
    assert step == 2 and (state["a"] == 2).all()


def test_group(finished, tmp_path):
    """Arrays of one name's beginning are read without knowing the others, to the bit; a step that
    is damaged is refused."""
    folder, states = finished
    arrays = checkpoint.load_group(folder / "2", "0/")
    assert_equal(
        arrays,
        {
            "double/lora_a": np.asarray(states[2][0]["double"]["lora_a"]),
            "single/lora_b": np.asarray(states[2][0]["single"]["lora_b"]),
        },
    )
    assert checkpoint.load_group(folder / "2", "7/") == {}
    (tmp_path / "3").mkdir()
    with pytest.raises(UserError, match="3: no intact checkpoint .*digests.*; take another step"):
        checkpoint.load_group(tmp_path / "3", "0/")


def test_disk_full(tmp_path, capfd):
    """A disk that takes no more: one clean error, no draft left, the older step still restores."""
    state = {"a": jax.random.normal(jax.random.key(0), (2**16,))}
    checkpoint.save(tmp_path, 1, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # bytes per file, a quarter of it
    try:
        with pytest.raises(UserError, match="step 2 cannot be saved: .*[Ff]ile too large"):
            checkpoint.save(tmp_path, 2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # what orbax's tasks have to say, they say when they die
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path) == ["1"]
    step, restored = checkpoint.restore(tmp_path, state)
    assert step == 1
    assert_equal(restored, state)


SAVER = """
import itertools, sys
import jax, jax.numpy as jnp
from vcloze_jax.devices import copy_to_hosts
from vcloze_jax.storage import checkpoint
next_step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
state = {"a": jnp.zeros((256, 256), int), "b": jnp.zeros((8,), int)}
for step in itertools.count(1):
    state = next_step(state)
    saving = checkpoint.begin(sys.argv[1], step, copy_to_hosts(state))
    for _ in range(100):
        state = next_step(state)
    state = jax.tree.map(lambda x: x - 100, state)
    saving.result()
    print(step, flush=True)
"""


def test_kill(tmp_path):
    """kill -9 at any moment of a save, while the state is changed in its place: what was reported
    as saved, or the next, restores whole, as it was when the save began."""
    like, rng = {"a": jnp.ones((256, 256), int), "b": jnp.ones((8,), int)}, random.Random(0)
    folders = [tmp_path / str(i) for i in range(3)]
    savers = [
        subprocess.Popen([sys.executable, "-c", SAVER, folder], stdout=subprocess.PIPE, text=True)
        for folder in folders
    ]
    for folder, saver in zip(folders, savers, strict=True):
        saver.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))  # a save takes about 0.1 s
        saver.kill()
        reported = int((saver.communicate()[0].split() or [1])[-1])
        step, state = checkpoint.restore(folder, like)
        assert step in (reported, reported + 1)
        assert_equal(state, jax.tree.map(lambda x, step=step: jnp.full_like(x, step), like))
        checkpoint.clean(folder)
        assert all(name.isdecimal() for name in os.listdir(folder))
