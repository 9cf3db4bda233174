"""Laws of the library: the same functions as sample.py, over pictures in memory."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import sample
from vcloze_jax import Pipeline
from vcloze_jax.config import UserError
from vcloze_jax.inputs.cachefolder import cache_folder
from vcloze_jax.inputs.spec import ANSWERS
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.storage import places, weights

PICTURES = Path(__file__).parents[1] / "examples/pictures"
POODLE, ROCKET = (
    [PICTURES / f"{name}_{view}.png" for view in ("fluent_flat", "fluent_3d")]
    for name in ("poodle", "rocket")
)
GRID = [POODLE, [ROCKET[0], None]]
SMALL = {"resolution": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.load(folder)


def test_light():
    """Importing the package imports no JAX, and nothing else that is slow."""
    check = "import sys, vcloze_jax; print({'jax', 'numpy', 'PIL', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_memory_is_disk(pipeline, tmp_path, monkeypatch):
    """Paths, PIL images and a spec that sample.py reads give the same bytes, also of the grid."""
    mask = PICTURES / "right_half.png"
    rows = [POODLE, [{"image": ROCKET[1], "mask": mask}, None]]
    loaded = [
        list(map(Image.open, POODLE)),
        [{"image": Image.open(ROCKET[1]), "mask": Image.open(mask)}, None],
    ]
    paths = json.loads(json.dumps(rows, default=str))
    (tmp_path / "fox.json").write_text(json.dumps({"image": paths, "seed": 4, **SMALL}))
    argv = ["--grid", tmp_path / "fox.json", "--out", tmp_path / "sample", "--weights"]
    sample.main([*map(str, argv), str(pipeline.painter.models.folder)])
    for name, image in {"paths": rows, "loaded": loaded}.items():
        painting = pipeline(image, seed=4, **SMALL)
        assert [picture.size for picture in painting.images] == [(32, 32)] * 2
        (tmp_path / name).mkdir()
        painting.save(tmp_path / name, "fox")
        for file in sorted((tmp_path / "sample").glob("*.png")):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name
    assert painting.record["spec"]["image"][0] == ["64x64, in memory"] * 2


def test_arguments(pipeline):
    """Latents may be an array; a wrong key or value is named as in a spec."""
    noise = np.asarray(jax.random.normal(jax.random.key(3), (16, 64)))
    given, seeded = (pipeline(GRID, **SMALL, **key) for key in ({"latents": noise}, {"seed": 3}))
    assert given.images[0].tobytes() == seeded.images[0].tobytes()
    for arguments, message in [
        (dict(sede=3), r"'sede': unknown key \(did you mean 'seed'\?\)"),
        (dict(seed=True), "seed: must be an integer"),
        (dict(latents=noise[1:]), r"latents: .* S = 16 tokens"),
        (dict(upsampling={"strength": 2}), "upsampling: strength: must be a number"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline(GRID, **SMALL, **arguments)
    (one,) = pipeline.paint({"image": GRID, **SMALL, "seed": 3})
    assert one.images[0].tobytes() == seeded.images[0].tobytes()
    with pytest.raises(UserError, match="a list is no spec: a file's path, or a dict"):
        pipeline.paint([GRID])
    for image, message in [
        ([[POODLE[0], 3]], r"image\[0\]\[1\]: a cell is a path, null or"),
        (["fox.png", None], r"image\[0\]: must be a list, a row of cells .* not a string"),
        ([[POODLE[0], None], None], r"image\[1\]: must be a list, a row of cells"),
        (Image.new("RGB", (8, 8)), "image: rows of cells are wanted"),
    ]:
        with pytest.raises(UserError, match=message):
            pipeline(image)


def test_arrays(pipeline):
    """A PIL image and the same picture as uint8 or float in [0, 1] are the same; so are a mask of
    PIL and of bools, and NumPy's integers and Python's."""
    pictures = [Image.open(file) for file in (*POODLE, ROCKET[1])]
    half = Image.open(PICTURES / "right_half.png")
    bools = np.asarray(half.convert("L")) >= 128
    kinds = {
        "PIL": (lambda x: x, half, 4),
        "uint8": (np.asarray, np.asarray(half), np.uint32(4)),
        "float": (lambda x: np.asarray(x.convert("RGB")) / 255, bools, np.int64(4)),
    }
    bytes_of = set()
    for convert, mask, seed in kinds.values():
        a, b, c = map(convert, pictures)
        painting = pipeline([[a, b], [{"image": c, "mask": mask}, None]], seed=seed, **SMALL)
        assert painting.record["spec"]["seed"] == 4
        bytes_of.add(painting.grid.tobytes())
    assert len(bytes_of) == 1
    for array, message in [
        (np.zeros((8, 8, 3), np.int64), r"an array int64 \[8, 8, 3\]; a picture is uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"an array uint8 \[3, 8, 8\]; a picture is uint8"),
        (np.full((8, 8, 3), 255.0), r"a float picture must be in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"a float picture must be in \[0, 1\]"),
    ]:
        with pytest.raises(UserError, match=rf"image\[0\]\[0\]: {message}"):
            pipeline([[array, None]])


def test_specs_and_files(pipeline, tmp_path):
    """paint() takes what a file would hold, files, and records, in order; several pictures of one
    spec are those of its seeds, one by one. A record of pictures in memory says so."""
    rows = json.loads(json.dumps(GRID, default=str))
    (tmp_path / "fox.json").write_text(json.dumps({"image": rows, "seed": 1, **SMALL}))
    several = {"image": GRID, "seed": 3, "num_images_per_prompt": 2, **SMALL}
    first, *rest = pipeline.paint([tmp_path / "fox.json", several])
    assert [p.record["spec"]["seed"] for p in rest] == [3, 4]
    for painting in (first, *rest):
        one = pipeline(GRID, seed=painting.record["spec"]["seed"], **SMALL)
        assert one.grid.tobytes() == painting.grid.tobytes()
        painting.save(tmp_path, "record")
        (again,) = pipeline.paint([str(tmp_path / "record.json")])
        assert again.grid.tobytes() == painting.grid.tobytes()
    pipeline([[Image.open(ROCKET[0]), None]], **SMALL).save(tmp_path, "record")
    with pytest.raises(UserError, match=r"image\[0\]\[0\]: '64x64, in memory': a program had it"):
        pipeline.paint([tmp_path / "record.json"])


@pytest.mark.parametrize("name, answer", ANSWERS.items())
def test_names_of_diffusers(pipeline, tmp_path, name, answer):
    """What diffusers' pipeline is told and ours is not, is answered with our name for it."""
    with pytest.raises(UserError, match=f"'{name}': {re.escape(answer)}"):
        pipeline(GRID, **{name: 1})


def test_one_mesh_a_process():
    """A mesh that needs more devices than JAX has started with says what to do, in one line, as
    does one that is none; a number is as good as its digits."""
    count = jax.device_count()
    with pytest.raises(UserError, match=f"{2 * count} devices asked for, {count} cpu here; JAX"):
        Pipeline.load(mesh=2 * count)
    for mesh in (0, {"fsdp": 2}):
        with pytest.raises(UserError, match=re.escape(f"--mesh {mesh}: ")):
            Pipeline.load(mesh=mesh)


def test_which_adapters():
    """The line of adapters says whether mini's own is among them."""
    tell, mini, own = places.describe_adapters, places.MINI_FOLDER, (places.MINI_LORA, 1.0)
    mine = Path("mine"), 0.5
    assert tell(Path("w"), [mine]) == "adapter: mine:0.5"
    assert tell(mini, [mine]) == "adapter: mine:0.5, in place of mini's own"
    assert tell(mini, [own, mine]) == f"adapter: {places.MINI_LORA} + mine:0.5"
    assert tell(mini, []) == "adapter: none, not even mini's own"


def test_dropped_tokens(pipeline):
    """What a long prompt loses is told per text encoder."""
    painting = pipeline(GRID, task_prompt="word " * 90, **SMALL)
    lost = painting.record["dropped_tokens"]
    assert lost["t5"] > 0 and lost["clip"] > 0
    assert painting.dropped == f"{lost['t5']} T5, {lost['clip']} CLIP"
    assert painting.unread == [f"the prompt is too long: {painting.dropped} tokens dropped"]
    short = pipeline(GRID, layout_prompt="", **SMALL)
    assert short.dropped == "" and short.unread == []


def test_unknown_characters(folder, tmp_path, capsys):
    """What no token stands for is in the record, of both passes, and one line on the terminal."""
    rows = json.loads(json.dumps(GRID, default=str))
    spec = {"image": rows, "task_prompt": "一只狐狸", "content_prompt": "狐狸", **SMALL}
    spec["upsampling"] = {"strength": 0.5, "num_inference_steps": 2}
    (tmp_path / "fox.json").write_text(json.dumps(spec))
    argv = ["--grid", tmp_path / "fox.json", "--out", tmp_path / "out", "--weights", folder]
    sample.main(list(map(str, argv)))
    record = json.loads((tmp_path / "out/fox.json").read_text())
    assert record["dropped_tokens"] == {"t5": 0, "clip": 0}
    assert record["unknown_characters"] == {"t5": 6, "clip": 0}
    assert record["upsampling"][0]["unknown_characters"] == {"t5": 2, "clip": 0}
    lines = capsys.readouterr().out.splitlines()
    assert "fox: the prompt has characters that no token stands for: 6 T5" in lines
    assert "fox: the content_prompt has characters that no token stands for: 2 T5" in lines


def test_text_encoders_go_first(folder, monkeypatch, tmp_path):
    """No text encoder is on a device when the next model is loaded, whether or not Python has
    looked for what nobody holds; a prompt that is remembered needs none and gives the same picture.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    embed = tiny.TINY.t5.vocab, tiny.TINY.t5.width
    count = lambda: sum(x.shape == embed for x in jax.live_arrays())  # noqa: E731
    loaded, there, read, before = [], [], weights.read_tree, count()

    def spy(module, *args):
        loaded.append(module.__name__)
        there.append(count() - before)  # other tests have theirs
        return read(module, *args)

    monkeypatch.setattr(weights, "read_tree", spy)
    gc.disable()
    try:
        first = Pipeline.load(folder)(GRID, **SMALL)
    finally:
        gc.enable()
    assert loaded == ["T5Encoder", "CLIPTextEncoder", "VAE", "Flux"]
    assert there[2:] == [0, 0]
    assert len(list((cache_folder() / "text").iterdir())) == 1
    loaded.clear()
    again = Pipeline.load(folder)(GRID, **SMALL)
    assert loaded == ["VAE", "Flux"]
    assert again.grid.tobytes() == first.grid.tobytes()


def test_other_weights_are_other_texts(folder, tmp_path):
    """The identity of what is remembered changes with the content of the weights' files, whatever
    their times, and with the mesh; a file that is copied is the same."""
    one = Pipeline.load(folder).painter.models.text_identity()
    assert one == Pipeline.load(folder).painter.models.text_identity()
    assert one != Pipeline.load(folder, mesh="2").painter.models.text_identity()
    file = folder / "text_encoder_2/model.safetensors"
    content, times = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    file.unlink()
    file.write_bytes(content)
    assert one == Pipeline.load(folder).painter.models.text_identity()
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times, times))
    assert one != Pipeline.load(folder).painter.models.text_identity()
    content[-3] ^= 1
    file.write_bytes(content)


def test_digests_of_large_files(tmp_path, monkeypatch):
    """Of a large file the header and blocks up to the end are looked at, of a small one all; name
    and place are not of a single file."""
    monkeypatch.setattr(places, "LARGE", 2**20)
    monkeypatch.setattr(places, "HEADER", 2**10)
    monkeypatch.setattr(places, "BLOCK", 2**10)
    content = bytearray(np.random.default_rng(0).bytes(2**21))
    spots = {5: True, 2**15 + 2**14: False, 2**20: True, 2**20 + 2**14: False, -1: True}
    for size in (2**19, 2**21):
        (tmp_path / "a").write_bytes(content[:size])
        one = places.digest_files(tmp_path / "a")
        (tmp_path / "b").write_bytes(content[:size])
        assert places.digest_files(tmp_path / "b") == one
        for spot, seen in spots.items():
            if abs(spot) < size:
                other = content[:size]
                other[spot] ^= 1
                (tmp_path / "b").write_bytes(other)
                changed = places.digest_files(tmp_path / "b") != one
                assert changed == (seen or size < 2**20), (size, spot)


@pytest.mark.parametrize("specs", [None, 7, [None]])
def test_what_is_no_spec_is_refused(pipeline, specs):
    """A user's line, not Python's."""
    with pytest.raises(UserError, match="is no spec: a file's path, or a dict"):
        pipeline.paint(specs)


def test_rows_may_be_tuples(pipeline):
    """In a spec as in a call."""
    rows = tuple(map(tuple, GRID))
    painted = pipeline.paint([{"image": rows, **SMALL}, {"image": GRID, **SMALL}])
    assert painted[0].images[0].tobytes() == painted[1].images[0].tobytes()


def test_an_empty_name_is_no_adapter(pipeline):
    """It is refused as any other that is not there."""
    with pytest.raises(UserError, match="adapter: there is no ''"):
        pipeline(GRID, **SMALL, adapter="")


def test_a_seed_of_nothing_is_refused(pipeline):
    """--seed draws the noise; where that is given, and no second pass draws another, it does
    nothing."""
    preset, noise = pipeline.painter.preset, np.zeros((16, 64), np.float32)
    spec = {"image": GRID, **SMALL, "latents": noise}
    with pytest.raises(UserError, match="seed: with latents given nothing is drawn"):
        read_specs([spec], preset, {"seed": 5})
    assert len(read_specs([spec | {"seed": 5}], preset)) == 1
