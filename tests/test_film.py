"""Laws of what is told of the steps: nothing changes by looking on, and what is shown is true."""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image
from test_pipeline import GRID, SMALL

import sample
from vcloze_jax import Pipeline
from vcloze_jax.film import Film, tell_steps
from vcloze_jax.inputs.pictures import save_film
from vcloze_jax.inputs.spec import KEYS
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.programs import tally


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")
    return Pipeline.load(folder, mesh="2")


def test_looking_on_changes_nothing(pipeline):
    """With a callback that decodes each step, the pictures are the same bytes and no program is
    made that painting does not use; the last step is the picture, and each says its time."""
    how = SMALL | {"num_inference_steps": 3, "upsampling": {"width": 48, "strength": 0.5}}
    alone, steps = pipeline(GRID, **how), []
    programs = tally["programs"]
    seen = pipeline(GRID, **how, on_step=lambda step: steps.append((step, step.preview())))
    assert tally["programs"] == programs
    assert seen.grid.tobytes() == alone.grid.tobytes()
    assert seen.images[0].tobytes() == alone.images[0].tobytes()
    first = [(step, preview) for step, preview in steps if not step.second_pass]
    assert [(step.index, step.count) for step, _ in first] == [(0, 3), (1, 3), (2, 3)]
    times = [step.time for step, _ in first]
    assert 1 > times[0] > times[1] > times[2] == 0
    last, preview = first[-1]
    assert np.array_equal(last.latents, seen.latents)
    assert np.array_equal(last.expected, seen.latents)
    assert preview.tobytes() == seen.grid.tobytes()
    assert [step.index for step, _ in steps[3:]] == [0, 1]  # of 3, int(3 - 3 * 0.5) are left out
    assert all(preview.size == (48 + 16, 48 + 16) for _, preview in steps[3:])


def test_a_film_of_each(pipeline, tmp_path):
    """Specs that no file holds have a film each, with all of its frames."""
    specs = [{"image": GRID, "seed": seed, **SMALL} for seed in (1, 2)]
    pipeline.paint(specs, on_step=Film(tmp_path))
    films = sorted(tmp_path.iterdir())
    assert [film.name for film in films] == ["grid-0_film.webp", "grid-1_film.webp"]
    for file in films:
        with Image.open(file) as film:
            assert film.n_frames == SMALL["num_inference_steps"]


def test_films_of_one_name(pipeline, tmp_path):
    """Two specs of one name share no frame."""
    (spec,) = read_specs([{"image": GRID, **SMALL}], tiny.TINY)
    pipeline.paint([spec, replace(spec, seed=3)], on_step=Film(tmp_path))
    (file,) = tmp_path.iterdir()
    with Image.open(file) as film:
        assert film.n_frames == SMALL["num_inference_steps"]


def test_large_films(tmp_path):
    """Frames that are larger than a WebP may be are made smaller, in their shape."""
    save_film(tmp_path / "wide.webp", [Image.new("RGB", (20_000, 40), c) for c in ("red", "blue")])
    with Image.open(tmp_path / "wide.webp") as film:
        assert film.n_frames == 2 and film.size == (16383, 33)


def test_what_is_expected(pipeline):
    """On a straight path every step expects its end; copies that fill a batch are not told of."""
    rng = np.random.default_rng(0)
    end, noise = rng.standard_normal((2, 4, 64)).astype(np.float32)
    times, told = np.array([1, 0.6, 0.1, 0], np.float32), []
    spec = SimpleNamespace(grid=SimpleNamespace(tokens=4))
    canvas = SimpleNamespace(times=times, spec=spec)
    watch = tell_steps(told.append, SimpleNamespace(decode=None))
    padded = np.zeros((4, 2, 6, 64), np.float32)
    for state, t in zip(padded, times, strict=True):
        state[:, :4] = (1 - t) * end + t * noise
    for i in range(3):
        watch([canvas], i, *padded[i : i + 2])
    assert len(told) == 3
    for step in told:
        np.testing.assert_allclose(step.expected, end, atol=1e-5)


def test_a_film(pipeline, tmp_path, capsys):
    """--film writes a frame a step of the grid as it is and will be, and leaves all else as it is
    without; a name that it takes is checked before anything is painted."""
    rows = json.loads(json.dumps(GRID, default=str))
    (tmp_path / "fox.json").write_text(json.dumps({"image": rows, **SMALL}))
    argv = ["--weights", str(pipeline.painter.models.folder), "--grid", f"{tmp_path}/fox.json"]
    sample.main([*argv, "--out", f"{tmp_path}/plain"])
    sample.main([*argv, "--out", f"{tmp_path}/film", "--film"])
    for file in (tmp_path / "plain").glob("*.png"):
        assert (tmp_path / "film" / file.name).read_bytes() == file.read_bytes()
    names = {file.name for file in (tmp_path / "film").iterdir()}
    assert names - {file.name for file in (tmp_path / "plain").iterdir()} == {"fox_film.webp"}
    film, sheet = (Image.open(tmp_path / "film" / n) for n in ("fox_film.webp", "fox.png"))
    assert film.n_frames == SMALL["num_inference_steps"]
    assert film.width == 2 * sheet.width
    film.seek(film.n_frames - 1)
    end = np.asarray(film.convert("RGB"), np.float32)[-sheet.height :, : sheet.width]
    assert np.abs(end - np.asarray(sheet, np.float32)).mean() < 6  # WebP is near, not exact


def test_a_typed_call():
    """A call names every key of a spec, so that an editor knows them, and nothing else."""
    names = [*inspect.signature(Pipeline.__call__).parameters]
    assert set(names) == {"self", *KEYS, "progress", "on_step", "unknown"}
