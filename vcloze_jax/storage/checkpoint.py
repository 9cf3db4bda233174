"""Checkpoints that are complete, intact and exactly what was saved, or refused.

A step is a folder `FOLDER/STEP`; while it is written or removed its name ends in `.tmp`, so that a
kill leaves no half step. Orbax itself does not notice a flipped bit and casts dtypes silently, so
beside its files lies `digests`: the SHA-256 of every file, checked before orbax reads a byte of it,
and type and SHA-256 of every array, checked against what the run needs and what orbax returns. No
older step goes before the new one was read back from the disk. A thread does all of this; a run
that goes on meanwhile gives it a copy of its state.

Arrays are stored flat, by their path in the tree (`0/double/img/qkv/lora_a`): neither the mesh nor
the tree's container types matter, `like` brings both. Several hosts share FOLDER; each writes,
digests and checks what its devices hold, and all agree which step is whole.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vcloze_jax.config import UserError
from vcloze_jax.hosts import Agreed, agreed, is_first, tell_all
from vcloze_jax.inputs.checks import describe_error, describe_with_file
from vcloze_jax.storage import digests
from vcloze_jax.storage.digests import Damaged, describe_type

KEPT = 2  # steps that stay, beside the one that is being written
ROOM = 2**29  # bytes that orbax copies at a time, beside the largest array twice
SAVING = ThreadPoolExecutor(1, "saving")
for _name in "absl", "asyncio":  # where the disk is full, orbax logs a hundred lines per thread
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def check_space(folder: str | Path, state) -> None:
    """Create `folder`; raise UserError unless the arrays of `state` (or their shapes) fit as often
    as they will lie there at once, those that lie there already counted in."""
    count = max(1, KEPT + 1 - len(_steps(folder)))
    need = count * sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder}: cannot hold checkpoints: {describe_error(error)}") from None
    if free < need:
        sizes = f"{free / 1e6:,.1f} MB are free, {need / 1e6:,.1f} MB more will be taken"
        raise UserError(f"{folder}: {sizes} by {KEPT + 1} checkpoints at once; free some space")


def resume(folder: str | Path, state) -> tuple[int, object]:
    """Make `folder` ready for a run's checkpoints, and take up the newest intact one: (step, state)
    as `restore` says, for which the given one, of jax arrays, is deleted, or (0, state) where there
    is none. Raises UserError."""
    with agreed():
        if is_first():
            clean(folder)
            check_space(folder, state)
    seen = tell_all(f"{Path(folder).is_dir()} {_steps(folder)}")
    if len(set(seen)) > 1:
        raise UserError(f"{folder}: hosts find different things there; give all one file system")
    if latest(folder) is None:
        return 0, state
    like = jax.tree.map(_abstract, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # or for a while there were two
    return restore(folder, like)


def clean(folder: str | Path) -> None:
    """Remove what killed runs left half written or half removed; at start, when nobody saves."""
    if is_first():
        for path in Path(folder).glob("[0-9]*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def latest(folder: str | Path) -> int | None:
    """The newest step, intact or not; None if no save was ever completed."""
    return max(_steps(folder), default=None)


def save(folder: str | Path, step: int, state, *, keep: int = KEPT) -> None:
    """`begin`, and wait for it."""
    begin(folder, step, state, keep=keep).result()


def begin(folder: str | Path, step: int, state, export=lambda: None, *, keep: int = KEPT) -> Future:
    """Begin to save a tree of arrays as `step`: a thread writes it, reads it back, calls `export`,
    so that what this makes is never older than a step, gives the step its name, and removes all but
    the last `keep`. Meanwhile the arrays stay as they are, and no other step is saved.

    Steps after this one go too: the run went back to before them. Leaves are jax arrays of any
    sharding, numpy arrays or numpy scalars. Raises UserError, now or as the result, if the disk
    refuses, or does not hold what was written; older steps stay.
    """
    folder = Path(folder).absolute()
    draft = folder / f"{step}.tmp"
    arrays = {k: x if isinstance(x, jax.Array) else np.asarray(x) for k, x in _named(state).items()}
    with _refusing(folder, step):
        with agreed():
            _reserve(draft, arrays.values())
        _room(draft).unlink()
        with _frugal_context(arrays):  # hosts meet by their devices, and only here
            written = ocp.save_async(draft / "arrays", arrays, overwrite=True)
    return SAVING.submit(_complete, draft, step, arrays, written, export, keep)


def _complete(draft: Path, step: int, arrays: dict, written, export, keep: int) -> None:
    """Wait until the arrays of a draft are `written`, and make a step of it."""
    with _refusing(draft.parent, step):
        written.result()
        with agreed():
            digests.write_digests(draft, arrays)
        with agreed():
            if is_first():
                digests.join_digests(draft)
        with agreed():
            digests.flush(draft)
            digests.check_files(draft)
        with agreed():
            export()
        with agreed():
            if is_first():
                _commit(draft, step, keep)


def _frugal_context(arrays: dict) -> ocp.Context:
    """Settings of orbax with which a thread of its own copies some arrays at a time, for which they
    stay as they are; else it would copy all of them before it begins."""
    context = ocp.Context()
    sizes = [x.size * x.dtype.itemsize for x in arrays.values()]
    room = ROOM + 2 * max(sizes, default=0)  # it refuses what is larger than its limit
    context.memory.transfer_concurrent_bytes = context.memory.read_concurrent_bytes = room
    context.memory.is_prioritized_key_fn = lambda _: False
    # Or devices that hold the same would each write a part, cut by a program for every array.
    context.array.saving.use_replica_parallel = False
    return context


def _commit(draft: Path, step: int, keep: int) -> None:
    """Give a whole step its name, and remove those that are not kept."""
    folder, final = draft.parent, draft.parent / str(step)
    if final.exists():  # damaged, or this very state
        _remove(final)
    draft.rename(final)
    kept = [s for s in _steps(folder) if s <= step][-keep:]
    for old in set(_steps(folder)).difference(kept):
        _remove(folder / str(old))


@contextmanager
def _refusing(folder: Path, step: int) -> Iterator[None]:
    """Whatever goes wrong inside, the step cannot be saved; what was written of it goes."""
    try:
        yield
    except Exception as error:  # a full disk has many classes in orbax
        clean(folder)
        reason = describe_error(error)
        kind = Agreed if isinstance(error, Agreed) else UserError
        raise kind(f"{folder}: step {step} cannot be saved: {reason}") from error


def _reserve(draft: Path, arrays) -> None:
    """Raise OSError unless the disk has room for what this host will write, which lies in
    `_room(draft)` then. Hosts that write wait for each other, for ever if one cannot."""
    draft.mkdir(parents=True, exist_ok=True)
    shards = [s for x in arrays for s in getattr(x, "addressable_shards", ())]
    size = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    with _room(draft).open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on a Mac
            os.posix_fallocate(file.fileno(), 0, max(1, size))


def _room(draft: Path) -> Path:
    return draft / f"room-{jax.process_index()}"


def restore(folder: str | Path, like) -> tuple[int, object]:
    """Read the newest intact step, bit for bit: (step, state), a tree of the form of `like`.

    `like` holds `jax.ShapeDtypeStruct`s (or arrays); leaves without a sharding become numpy arrays.
    A damaged step costs a line on stderr and the next older one is taken. Raises UserError if none
    is intact, and, naming the array, if the stored arrays are not those of `like`.
    """
    return _take_newest(folder, lambda path: _read(path, like))


def check_newest(folder: str | Path) -> None:
    """Say what `restore` would of damaged files, without reading an array. Raises UserError if
    there are steps and none is intact."""
    if _steps(folder):
        _take_newest(folder, digests.check_files)


def _take_newest(folder: str | Path, read: Callable[[Path], object]) -> tuple[int, object]:
    """The newest step whose folder `read` takes for intact, and what it returned."""
    damages = []
    for step in reversed(_steps(folder)):
        try:
            found = read(Path(folder).absolute() / str(step))
        except (OSError, Damaged) as error:
            damages.append(f"step {step}: {describe_with_file(error)}")
        else:
            for damage in damages:
                print(f"warning: {folder}: {damage}; going back to step {step}", file=sys.stderr)
            return step, found
    why = "; ".join(damages) or "it is empty"
    adapter = Path(folder).parent / "lora.safetensors"
    other = f", or go on in another --out with --lora {adapter}" if adapter.is_file() else ""
    raise UserError(
        f"{folder}: no intact checkpoint ({why}); move the folder away to start anew{other}"
    )


def load_group(path: str | Path, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of one step's folder whose names begin with `prefix`, by the rest of the name, on
    the host; no other one is read. Raises UserError if they are not what was saved."""
    try:
        stored = digests.check_files(Path(path).absolute())
        names = {name: has for name, (has, _) in stored.items() if name.startswith(prefix)}
        wanted = {name: _blank(has) for name, has in names.items()}
        arrays = _load(Path(path).absolute(), stored, wanted) if wanted else {}
    except (OSError, Damaged) as error:
        raise UserError(
            f"{path}: no intact checkpoint ({describe_with_file(error)}); take another step"
        ) from None
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _read(path: Path, like):
    stored, wanted = _agreed_digests(path), _named(like)
    flat = {}  # of version 0.1.0, in which heads were no axis of their own
    for name in sorted(stored.keys() | wanted.keys()):
        has = stored[name][0] if name in stored else "missing"
        needs = describe_type(wanted[name]) if name in wanted else "no such array"
        if has != needs and name in stored and name in wanted and _is_joined(has, wanted[name]):
            flat[name] = _blank(has)
        elif has != needs:
            remedy = "resume with the flags that it was saved with"
            raise UserError(f"{path}: {name} is {has}, this run needs {needs}; {remedy}")
    arrays = _load(path, stored, {name: _abstract(x) for name, x in wanted.items()} | flat)
    for name in flat:
        sharding = getattr(wanted[name], "sharding", None)
        array = arrays[name].reshape(wanted[name].shape)
        if sharding is not None:
            array = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        arrays[name] = array
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _agreed_digests(path: Path) -> dict:
    """`check_files`; what is damaged to one host is damaged to all."""
    stored, damage = {}, ""
    try:
        stored = digests.check_files(path)
    except (OSError, Damaged) as error:
        damage = describe_with_file(error)
    _agree_on_damage(damage)
    return stored


def _agree_on_damage(damage: str) -> None:
    """Raise Damaged with what the first host says that says anything."""
    for said in tell_all(damage):
        if said:
            raise Damaged(said)


def _load(path: Path, stored: dict, wanted: dict) -> dict:
    """Some arrays of a step whose files were checked, by name, as `wanted` says."""
    context = _frugal_context(wanted)
    context.pytree.loading.partial_load = True
    with context:
        arrays = ocp.load(path / "arrays", wanted)
    odd = [name for name, x in arrays.items() if not digests.is_as_saved(x, stored[name][1])]
    _agree_on_damage(f"array {odd[0]} is not what was saved" if odd else "")
    return arrays


def _blank(text: str) -> np.ndarray:
    """An array of a `describe_type`, into which orbax reads."""
    dtype, _, shape = text.partition("[")
    return np.empty(json.loads(f"[{shape}"), jax.numpy.dtype(dtype))


def _is_joined(text: str, array) -> bool:
    """Whether a `describe_type` is that of the array, but that neighbours among all but its first
    axis, of layers, are one."""
    blank = _blank(text)
    same = (blank.dtype, blank.size, blank.shape[:1]) == (array.dtype, array.size, array.shape[:1])
    return same and set(np.cumprod(blank.shape)) <= set(np.cumprod(array.shape))


def _abstract(array):
    sharding = getattr(array, "sharding", None)
    if sharding is None:
        return np.empty(array.shape, array.dtype)  # orbax answers numpy with numpy
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _named(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _steps(folder: str | Path) -> list[int]:
    return sorted(int(p.name) for p in Path(folder).glob("[0-9]*") if p.name.isdecimal())


def _remove(step: Path) -> None:
    shutil.rmtree(step.rename(f"{step}.old.tmp"))
