"""--cache DIR: what the encoders make of the user's own grids, made before the first step.

The text encoders are loaded for it, and gone before the MMDiT comes; the steps read files. Of a row
that is the mean and the deviation of its posterior, from which each step draws; of a prompt what
the MMDiT reads. An entry is known by its content and its encoder's (arraystore.py), so that DIR may
serve several runs, weights and data at once, hosts share the work, and a filling that was
interrupted goes on.
"""

import os
import shutil
import time
from dataclasses import fields
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vcloze_jax.conditioning import encode_text
from vcloze_jax.config import DATA, UserError
from vcloze_jax.data.listing import count_rows, list_grids, list_members, list_prompts
from vcloze_jax.hosts import agreed, is_first, pick_share
from vcloze_jax.inputs.checks import describe_error
from vcloze_jax.inputs.terminal import si
from vcloze_jax.rowmemory import RowMemory
from vcloze_jax.sharding import compute_dtype
from vcloze_jax.storage.arraystore import ArrayStore
from vcloze_jax.storage.models import TEXT_ENCODERS, LazyModels, check_loading
from vcloze_jax.storage.textreader import TextStore

MOST = 10**6  # prompts, 4 TB of FLUX's
HEADER = 200  # bytes of a file beside its arrays
NOTE = ".complete"  # how a file is called that says so
PATIENCE = 60  # seconds until a drive shows what other hosts wrote


class GridCache:
    """The entries of one preset's encoders, `models`, in a folder."""

    def __init__(self, recipe, models):
        self.recipe, self.models, self.dtype = recipe, models, compute_dtype(models.mesh)
        of_rows = repr((models.identity("vae"), recipe.mask_fill))
        self.rows = self.open_store(ArrayStore, "rows", of_rows, ("moments",))
        self.texts = self.open_store(TextStore, "texts", models.identity(*TEXT_ENCODERS))

    def open_store(self, store, kind, identity, *names):
        digest = sha256(identity.encode()).hexdigest()[:16]
        return store(Path(self.recipe.cache, f"{kind}-{digest}"), identity, *names)

    def read_prompts(self, prompts, tokenizers):
        """What the encoders made of prompts, txt [B, T, text_width] and pooled [B, vec_width], and
        what they did not read; where Tokenizers gives ids. Raises UserError for one that is not
        there."""
        *ids, unread = tokenizers(prompts)
        read = map(self.read, split_ids(*ids))
        return *map(np.stack, zip(*read, strict=True)), unread

    def read(self, ids):
        """The same of one prompt's ids [1, T] and [1, 77], as TextReader asks for it."""
        if embeddings := self.texts.read(ids):
            return embeddings
        file = self.texts.file(ids)
        for stale in (file, *self.texts.folder.glob(f"*{NOTE}")):
            stale.unlink(missing_ok=True)
        again = "start the command again, which will make it anew"
        raise UserError(f"{file}: damaged or gone; {again}")

    def notes(self, source, prompts):
        """Files that say that all rows of a source, and all of some prompts, are there: where they
        are, no picture is opened, and no prompt tokenized, to know it."""
        recipe = self.recipe
        values = [getattr(recipe, f.name) for f in fields(recipe) if f.metadata["section"] == DATA]
        apart = self.models.preset.flux.placement.apart
        of_rows = repr((source.digest(), recipe.group, apart, *values))
        pairs = (self.rows, of_rows), (self.texts, repr(prompts))
        names = [(store.folder, sha256(text.encode()).hexdigest()[:16]) for store, text in pairs]
        return [folder / f"{name}{NOTE}" for folder, name in names]

    def announce(self, keys, rows, tokens):
        """Say how much these prompts take, and so many rows of so many image tokens. Raises
        UserError where the disk has not as much as is missing."""
        preset, folder = self.models.preset, Path(self.recipe.cache)
        width = np.dtype(self.dtype).itemsize
        prompt = (preset.t5.max_length * preset.flux.text_width + preset.flux.vec_width) * width
        of_rows = tokens * 2 * 64 * width + rows * HEADER
        total = len(keys) * (prompt + HEADER) + of_rows
        there = (len(keys) - len(self.find_missing(keys))) * (prompt + HEADER)
        found = sum(file.stat().st_size for file in self.rows.folder.glob("*.safetensors"))
        there += min(of_rows, found)  # some may be of other pictures
        free = shutil.disk_usage(folder).free
        parts = f"{len(keys)} prompts of {si(prompt, 'B')}, {rows} rows"
        line = f"--cache {folder}: {parts}, {si(total, 'B')} at most, {si(there, 'B')} there"
        if total - there > free:
            remedy = "free some space, or have fewer prompts: --fixed-templates"
            raise UserError(f"{line}; {si(free, 'B')} are free; {remedy}")
        print(f"{line}, {si(free, 'B')} free", flush=True)

    def fill_rows(self, source):
        """Encode this host's share of the rows of a source, those that are not there."""
        vae, members = self.models.load("vae"), pick_share(list_members(source))
        placement = self.models.preset.flux.placement
        memory = RowMemory(vae, self.recipe.mask_fill, self.dtype, self.rows, placement)
        grids_by_sample = self.read_ahead(source, members)
        for grids in self.show(grids_by_sample, "samples", total=len(members)):
            for grid in grids:
                memory.encode_grid(grid)

    def read_ahead(self, source, members):
        """The grids of some samples, opened ahead in threads."""
        import grain

        threads = self.recipe.threads
        grids = grain.MapDataset.range(len(members)).map(
            lambda i: list_grids(source, *members[int(i)])
        )
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))
        return grids.to_iter_dataset(options) if members else []

    def fill_texts(self, keys):
        """Read this host's share of the prompts, those that are not there."""
        if missing := self.find_missing(pick_share(keys)):
            encoders = self.models.load_encoders()
            encode = jax.jit(partial(encode_text, dtype=self.dtype))
            for key in self.show(missing, "prompts", total=len(missing)):
                self.texts.write(key, [np.asarray(x[0]) for x in encode(*encoders, *key)])

    def show(self, things, name, total):
        """A bar over things that are encoded."""
        how = dict(total=total, dynamic_ncols=True, disable=not is_first())
        return tqdm(things, f"encoding {name}", **how)

    def find_missing(self, keys):
        """Those of some prompts' keys that have no file."""
        names = set(os.listdir(self.texts.folder))
        return [key for key in keys if self.texts.file(key).name not in names]

    def wait_for(self, keys):
        """Wait until this host sees what the others wrote. Raises UserError if it does not."""
        end = time.monotonic() + PATIENCE
        while self.find_missing(keys):
            if time.monotonic() > end:
                reason = "what other hosts wrote is not there; name a folder that all of them see"
                raise UserError(f"--cache {self.recipe.cache}: {reason}")
            time.sleep(1)


def fill_cache(source, preset, folder, mesh, tokenizers, checkpoints):
    """A GridCache that holds all which training on a source reads, or None without --cache; no
    model is left in memory. Every host encodes its share, by itself, on its devices. Raises
    UserError, first for what loading would refuse after hours of encoding."""
    if not preset.recipe.cache:
        return None
    here = Mesh(np.reshape(mesh.local_devices, (1, 1, -1, 1)), mesh.axis_names)
    cache = GridCache(preset.recipe, LazyModels(folder, preset, (), here))
    with agreed():
        try:
            for store in (cache.rows, cache.texts):
                store.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made: {describe_error(error)}; choose another folder"
            raise UserError(f"--cache {preset.recipe.cache}: {reason}") from None
        prompts = list_distinct(source)
        notes = cache.notes(source, prompts)
        rows_done, texts_done = (note.exists() for note in notes)
        keys = [] if texts_done else list_keys(prompts, tokenizers)
        if not (rows_done and texts_done):
            check_loading(preset, folder, checkpoints)
            cache.announce(keys, *(0, 0) if rows_done else count_rows(source))
        if not rows_done:
            cache.fill_rows(source)
        cache.fill_texts(keys)
    with agreed():
        cache.wait_for(keys)
        for note in notes if is_first() else ():
            note.touch()
    return cache


def list_distinct(source):
    """All prompts of a source, each once. Raises UserError where they are too many."""
    prompts = {}
    for prompt in list_prompts(source):
        prompts[prompt] = None
        if len(prompts) > MOST:
            remedy = "word them as sampling does, with --fixed-templates"
            raise UserError(f"--cache: more than {MOST:,} prompts; {remedy}, or leave it away")
    return list(prompts)


def list_keys(prompts, tokenizers):
    """The token ids of prompts, int32 [1, T] and [1, 77], each pair once."""
    bar = dict(unit="prompt", leave=False, delay=2, disable=not is_first())
    keys, prompts = {}, iter(tqdm(prompts, "reading prompts", **bar))
    while some := list(islice(prompts, 1000)):
        *ids, _ = tokenizers(some)
        keys |= {(t5.tobytes(), clip.tobytes()): (t5, clip) for t5, clip in split_ids(*ids)}
    return list(keys.values())


def split_ids(t5_ids, clip_ids):
    """The key of each prompt, as TextReader has it, of ids [B, T] and [B, 77]."""
    return zip(t5_ids[:, None], clip_ids[:, None], strict=True)
