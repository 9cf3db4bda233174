"""Laws of the Painter: what a picture depends on, and what is compiled for it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from paintspecs import BLANK, PARTLY, POODLE, SMALL, TOKENS

from vcloze_jax.config import UserError
from vcloze_jax.devices import cpu_mesh, make_mesh, painting_mesh, parse_mesh
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.pipeline import load_painter
from vcloze_jax.programs import tally
from vcloze_jax.runwriter import make_painter
from vcloze_jax.storage import adapters, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def painters(folder):
    """Painters of the same models on 1 and on 8 devices."""
    return {size: load_painter(folder, None, str(size)) for size in (1, 8)}


def jobs(tmp_path, *specs):
    """Specs as the Painter takes them."""
    (tmp_path / "jobs.json").write_text(json.dumps([SMALL | spec for spec in specs]))
    return read_specs([tmp_path / "jobs.json"], tiny.TINY)


def test_alone_is_in_a_batch(painters, tmp_path, monkeypatch):
    """A grid's latents do not depend on who is painted beside it, nor on padding: 1e-5 of their
    size, since sums of another length are ordered otherwise."""
    small = {"image": [[POODLE[0], None]]}  # half the tokens: padded beside the others
    batch = jobs(tmp_path, BLANK, PARTLY, BLANK | {"guidance_scale": 3}, small)
    painter = painters[1]
    with monkeypatch.context() as patch:
        patch.setattr("vcloze_jax.painter.bucket", lambda tokens, resolution: 2 * TOKENS)
        together = painter(batch)
    for one, painted in zip(batch, together, strict=True):
        (alone,) = painter([one])
        assert alone.latents.shape == painted.latents.shape == (one.grid.tokens, 64)
        assert tiny.relative(painted.latents, alone.latents) < 1e-5


def test_split_evenly(painters, tmp_path, monkeypatch):
    """A group larger than a batch is split into batches of one size, filled with copies that are
    dropped: five grids, at most two at once, are one program, and each is what it is alone."""
    painter = painters[1]
    batch = jobs(tmp_path, *(BLANK | {"seed": seed} for seed in range(5)))
    alone = [painter([one])[0] for one in batch]
    monkeypatch.setattr("vcloze_jax.painter.BATCH_TOKENS", 4 * TOKENS)
    labels, before = [], tally["programs"]
    together = painter(batch, lambda steps, label: labels.append(label) or steps)
    assert labels == [f"{n} x {2 * TOKENS} tokens" for n in (2, 2, 1)]
    assert tally["programs"] - before <= 3  # a batch of two: modulations, those of a step, the step
    for one, painted in zip(alone, together, strict=True):
        assert tiny.relative(painted.latents, one.latents) < 1e-5


def test_mesh(painters, tmp_path):
    """Eight devices paint what one paints: 1e-5, since sums are ordered otherwise."""
    batch = jobs(tmp_path, BLANK, PARTLY, BLANK | {"seed": 5})
    for one, eight in zip(painters[1](batch), painters[8](batch), strict=True):
        assert tiny.relative(eight.latents, one.latents) < 1e-5


def test_virtual_devices_paint_no_copies():
    """A run on eight virtual devices paints its previews on one, without seven copies of a grid on
    the same cores; of accelerators all paint."""
    parts = dict(frozen={}, tokenizers=None, dtype="float32")
    trainer = SimpleNamespace(preset=tiny.TINY, mesh=make_mesh(parse_mesh("8")), **parts)
    assert make_painter(trainer, None).shards == 1
    cards = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")] * 8))
    assert painting_mesh(cards) is cards


@pytest.mark.parametrize("mesh", ["1", "2"])
def test_offload(folder, tmp_path, mesh):
    """Where the MMDiT's blocks wait in host memory, adapter and all, the picture is the same. Their
    vectors stay: no TPU cuts one of many there."""
    lora = tmp_path / "lora.safetensors"
    ranked = replace(tiny.TINY.flux, rank=4)
    adapters.save(lora, tiny.filled(weights.abstract(Flux, ranked)[1]))
    one, other = (load_painter(folder, [str(lora)], mesh, offload) for offload in (False, True))
    specs = jobs(tmp_path, BLANK)
    assert np.array_equal(*(painter(specs)[0].pixels for painter in (one, other)))
    blocks = other.models.flux.double, other.models.flux.single
    for x in jax.tree.leaves(blocks):
        assert x.sharding.memory_kind == ("pinned_host" if x.ndim > 2 else "device")
    assert jax.tree.leaves(other.models.flux.final)[0].sharding.memory_kind == "device"


def test_offload_needs_the_cpu(monkeypatch):
    """It is there unless the environment keeps it out: said in a line."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", lambda *_: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda: --offload needs the CPU, too"):
        cpu_mesh()


def test_offload_is_of_one_host(folder, monkeypatch):
    """Of several hosts none offloads: said in a line, before anything is loaded."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        UserError, match="--offload: one host's memory is meant; of several, --mesh"
    ):
        load_painter(folder, None, None, True)


def test_compiles(painters, tmp_path, monkeypatch):
    """Grids of the same bucket and rows share their programs; another number of steps costs no
    more than its modulations, and another bucket has them already."""
    painter = painters[1]
    painter(jobs(tmp_path, BLANK | {"content_prompt": f"{tmp_path}"}))  # which nothing remembers
    before = tally["programs"]
    painter(
        jobs(
            tmp_path, BLANK | {"seed": 5, "guidance_scale": 2, "content_prompt": f"{tmp_path} owl"}
        )
    )
    assert tally["programs"] == before
    painter(jobs(tmp_path, BLANK | {"num_inference_steps": 3}))
    assert tally["programs"] - before <= 2  # the modulations, and those of a step
    before = tally["programs"]
    monkeypatch.setattr("vcloze_jax.painter.bucket", lambda tokens, resolution: 3 * TOKENS)
    painter(jobs(tmp_path, BLANK))
    assert tally["programs"] - before == 1  # a step
