"""One adapter in every naming: the same to the last bit, or refused by name."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import lorafiles
import numpy as np
import pytest
from lorafiles import NAMINGS, PLAIN, edited, folded, renamed, same_tensors, same_trees, tensors
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import UserError
from vcloze_jax.ports import __main__ as command
from vcloze_jax.ports import export, torchfile
from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.storage import adapters

ROOT = Path(__file__).parents[1]
Q, V = (f"transformer.transformer_blocks.1.attn.to_{part}" for part in "qv")


@pytest.fixture(scope="module")
def tree():
    """An adapter without biases, which every naming can hold."""
    return lorafiles.adapter(bias=False)


@pytest.fixture
def file(tree, tmp_path):
    return lorafiles.written(tmp_path, tree, bias=False)


def respelled(file, spell):
    """A safetensors file with other keys, beside it."""
    out = file.with_name("respelled.safetensors")
    save_file({spell(key): x for key, x in tensors(file).items()}, out)
    return out


def flat(key):
    """A key of diffusers as OneTrainer writes it."""
    module, suffix = re.fullmatch(r"transformer\.(.+)(\.lora_[AB]\.weight)", key).groups()
    return "lora_transformer_" + module.replace(".", "_") + down_up(suffix)


def within_peft(key):
    return "base_model.model." + key.removeprefix("transformer.")


def down_up(key):
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


SPELLINGS = {  # naming it starts from, what is done to its keys
    "PEFT": ("diffusers", lambda key: within_peft(key)),
    "PEFT, unsaved": ("diffusers", lambda key: within_peft(key).replace(".lora_A.", ".lora_A.a.")),
    "diffusers, wrapped": ("diffusers", lambda key: key.replace("r.", "r.base_model.model.", 1)),
    "compiled": ("diffusers", lambda key: key.replace("transformer.", "transformer._orig_mod.")),
    "DDP, compiled": ("diffusers", lambda key: "module._orig_mod." + key),
    "kohya, compiled": ("kohya", lambda key: key.replace("unet_", "unet__orig_mod_", 1)),
    "FSDP": ("diffusers", lambda key: key.replace(".attn", "._fsdp_wrapped_module.attn")),
    "DeepSpeed": ("diffusers", lambda key: "_forward_module." + key),
    "diffusers, old": ("diffusers", down_up),
    "diffusers, older": ("diffusers", lambda key: down_up(key).replace(".lora_", ".lora.")),
    "diffusers, oldest": (
        "diffusers",
        lambda key: down_up(key).replace(".lora_", ".lora_linear_layer."),
    ),
    "OneTrainer": ("diffusers", flat),
    "SimpleTuner": ("diffusers", lambda key: flat(key).replace("lora_transformer", "lycoris")),
    "BFL": ("visualcloze", str),
    "ComfyUI": ("visualcloze", lambda key: f"diffusion_model.{key}"),
    "ComfyUI, old": ("visualcloze", lambda key: f"diffusion_model.{down_up(key)}"),
}


def test_every_naming_folds_alike(tree, file):
    """In each of the three namings that we write and each of those that others write, at scale 1
    and 0.5, an adapter gives the same folded weights, bit for bit; at scale 1 the exact ones.
    Of one rank in every layer, it can be trained on, whatever its naming."""
    base = lorafiles.base()
    exact = base["double"]["txt"]["qkv"]["kernel"].astype(np.float64)
    branch = tree["double"]["txt"]["qkv"]
    exact = exact + np.einsum("lir,lr...->li...", np.float64(branch["lora_a"]), branch["lora_b"])
    found = {"diffusers": file} | {to: renamed(file, to) for to in ("kohya", "visualcloze")}
    wanted = {scale: folded(base, tree, scale) for scale in (1, 0.5)}
    np.testing.assert_array_equal(wanted[1]["double"]["txt"]["qkv"]["kernel"], exact)
    for scale in wanted:
        for one in found.values():
            same_trees(folded(base, adapters.load(one, PLAIN), scale), wanted[scale])
    for start, spell in SPELLINGS.values():
        same_trees(adapters.load(respelled(found[start], spell), PLAIN), tree)
    for one in found.values():
        assert adapters.fit(one, adapters.load(one, PLAIN), PLAIN) == lorafiles.RANKED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_round_trips_are_bit_identical(tmp_path, dtype, bias):
    """There and back through each naming, every tensor and the header are as they were; a bias on B
    goes through those namings that have one, and kohya's refuses it by name."""
    file = lorafiles.written(tmp_path, lorafiles.adapter(bias), bias)
    save_file({k: x.astype(dtype) for k, x in load_file(file).items()}, file)
    renamed(file, "visualcloze")
    start = renamed(file.with_name(NAMINGS["visualcloze"]), "diffusers")
    before, header = tensors(start), lorafiles.metadata(start)
    for through in NAMINGS:
        if through == "kohya" and bias:
            with pytest.raises(PortError, match="lora_unet_img_in has a bias on B, which kohya's"):
                renamed(start, through)
            assert not (tmp_path / "kohya.safetensors").exists()
            continue
        there = renamed(start, through)
        again = tensors(there)
        back = renamed(there, "diffusers")
        same_tensors(tensors(back), before)
        assert lorafiles.metadata(back) == header
        same_tensors(tensors(renamed(back, through)), again)


def parts(rank_q=3, rank_v=2, alphas=(None, None), dtype=np.float32):
    """q and v of one block, each with an A and a rank of its own, as most adapters have them."""
    rng = np.random.default_rng(3)
    out = {}
    for stem, rank, alpha in zip((Q, V), (rank_q, rank_v), alphas, strict=True):
        out[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, 16)).astype(dtype)
        out[f"{stem}.lora_B.weight"] = rng.standard_normal((16, rank)).astype(dtype)
        if alpha is not None:
            out[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return out


@pytest.mark.parametrize("to", ["kohya", "visualcloze"])
def test_an_a_of_its_own_for_each_part(tmp_path, to):
    """q and v that share no A become one fused layer, A side by side and B block-diagonal: ours is
    the same to the last bit, and they come apart again as they were."""
    file = tmp_path / NAMINGS["diffusers"]
    save_file(parts(), file)
    before, tree = load_file(file), adapters.load(file, PLAIN)
    there = renamed(file, to)
    assert sorted(x.shape for x in tensors(there).values() if x.ndim) == [(5, 16), (48, 5)]
    same_trees(adapters.load(there, PLAIN), tree)
    same_tensors(tensors(renamed(there, "diffusers")), before)


def test_alphas(tmp_path):
    """Alphas of equal alpha / r add up with the ranks, and come back; so does every layer's scale
    in float32, and a rank-stabilised one."""
    file = tmp_path / NAMINGS["diffusers"]
    save_file(parts(alphas=(1.5, 1.0)), file)
    tree = adapters.load(file, PLAIN)
    there = renamed(file, "kohya")
    assert load_file(there)["lora_unet_double_blocks_1_img_attn_qkv.alpha"] == 2.5
    same_trees(adapters.load(there, PLAIN), tree)
    back = renamed(there, "diffusers")
    same_trees(adapters.load(back, PLAIN), tree)
    save_file(parts(rank_v=3), file)
    edited(file, lambda d: d, lora_alpha=7, use_rslora=True)
    tree = adapters.load(file, PLAIN)
    for to in ("kohya", "diffusers"):
        file = renamed(file, to)
        same_trees(adapters.load(file, PLAIN), tree)


@pytest.mark.parametrize("to", NAMINGS)
@pytest.mark.parametrize("alpha", [1e308, -1e39])
def test_an_alpha_beyond_float32(tmp_path, to, alpha):
    """What sample.py would refuse, or paint as infinity, is not converted either."""
    file = lorafiles.written(tmp_path, lorafiles.adapter(bias=False), bias=False)
    file = edited(file, lambda d: d, lora_alpha=alpha)
    file = file.rename(tmp_path / "huge.safetensors")
    with pytest.raises(PortError, match="alpha .* is beyond float32"):
        renamed(file, to)
    with pytest.raises(UserError, match="alpha .* is beyond float32"):
        adapters.load(file, PLAIN)


def test_alphas_that_no_naming_holds(tmp_path):
    """VisualCloze's naming, and a fused layer of parts of different alpha / r, take alpha / r into
    B where that is exact, in float32 if the file's own type has not the bits; else an error."""
    file = tmp_path / NAMINGS["diffusers"]
    for alphas, exact in (((1.5, 1.0), True), ((3.0, 1.0), True), ((1.0, 2.0), False)):
        save_file(parts(alphas=alphas), file)
        tree = adapters.load(file, PLAIN)
        for to in ("visualcloze", "kohya"):
            if exact:
                same_trees(adapters.load(renamed(file, to), PLAIN), tree)
            else:
                with pytest.raises(PortError, match=r"to_q has alpha / rank 1 / 3, which cannot"):
                    renamed(file, to)
    small = parts(4, 4, (2.0**-9, 2.0**-9), np.float16)
    save_file(small, file)
    tree = adapters.load(file, PLAIN)
    there = renamed(file, "visualcloze")
    assert {x.dtype for x in tensors(there).values()} == {np.dtype("f2"), np.dtype("f4")}
    same_trees(adapters.load(there, PLAIN), tree)


def control(file):
    """VisualCloze's file as a control adapter of BFL: safetensors, with all norms of q and k."""
    norms = {
        f"{block}.{side}_norm.scale": np.float32(np.arange(8) + i)
        for i, block in enumerate(
            [f"double_blocks.{n}.{x}_attn.norm" for n in range(2) for x in ("img", "txt")]
            + [f"single_blocks.{n}.norm" for n in range(2)]
        )
        for side in ("query", "key")
    }
    out = file.with_name("control.safetensors")
    save_file(tensors(file) | norms, out)
    return out, norms


def test_control_adapters(tmp_path):
    """A control adapter of BFL replaces norms besides; ours holds them, diffusers' naming too, and
    kohya's refuses them. It cannot be trained on. Some norms without the others are an error."""
    tree = lorafiles.adapter()
    file, norms = control(renamed(lorafiles.written(tmp_path, tree), "visualcloze"))
    got = adapters.load(file, PLAIN)
    for i in range(2):
        scale = got["double"]["txt"]["k_norm"]["scale"][i]
        np.testing.assert_array_equal(
            scale, norms[f"double_blocks.{i}.txt_attn.norm.key_norm.scale"]
        )
    back = renamed(renamed(file, "diffusers"), "visualcloze")
    same_trees(adapters.load(back, PLAIN), got)
    torchfile.save(pickled := tmp_path / "control.pth", load_file(file))
    same_tensors(tensors(renamed(pickled, "diffusers")), tensors(renamed(file, "diffusers")))
    same_tensors(dict(sorted(tensors(back).items())), dict(sorted(load_file(file).items())))
    with pytest.raises(adapters.UserError, match="cannot be trained on"):
        adapters.fit(file, got, PLAIN)
    bare = edited(file, lambda d: {k: x for k, x in d.items() if not k.endswith("bias")})
    with pytest.raises(PortError, match="query_norm.scale is a whole norm, which kohya's"):
        renamed(bare, "kohya")
    edited(file, lambda d: {k: x for k, x in d.items() if "single_blocks.1.norm.key" not in k})
    with pytest.raises(adapters.UserError, match="single_blocks.1.norm.key_norm.scale is missing"):
        adapters.check(file, PLAIN)


def test_command_needs_no_jax(file, tmp_path):
    """`python -m ports lora` converts where JAX cannot be imported, and says what it wrote."""
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison/jax.py").write_text("raise ImportError('jax is poisoned')\n")
    out = tmp_path / "out.pth"
    done = subprocess.run(
        [sys.executable, "-m", "ports", "lora", file, "--to", "visualcloze", "--out", out],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "poison")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 36 linear layers in VisualCloze's (BFL's) naming\n"
    same_tensors(tensors(out), tensors(renamed(file, "visualcloze")))


def test_command_errors(file, tmp_path, capsys):
    """A wrong ending, a file that is none and one that is no adapter: one line, exit 2, no file."""
    broken = tmp_path / "broken.safetensors"
    save_file({"wte.weight": np.zeros(1)}, broken)
    for source, to, out, words in (
        (file, "visualcloze", "a.safetensors", "ends in .pth"),
        (file, "kohya", "a.pth", "ends in .safetensors"),
        (tmp_path / "nowhere", "kohya", "a.safetensors", "nowhere"),
        (tmp_path, "kohya", "a.safetensors", str(tmp_path)),
        (broken, "kohya", "a.safetensors", "no adapter of FLUX"),
    ):
        arguments = ["lora", str(source), "--to", to, "--out", str(tmp_path / out)]
        assert command.main(arguments) == 2
        assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", capsys.readouterr().err)
        assert not (tmp_path / out).exists()


def test_command_writes_whole_new_files(file, tmp_path, capsys, monkeypatch):
    """The folder is made, what is there stays, and of a write that fails nothing does."""
    argv = ["lora", str(file), "--to", "kohya", "--out", str(tmp_path / "new/a.safetensors")]
    assert command.main(argv) == 0
    assert command.main(argv) == 2 and "exists already; name a new file" in capsys.readouterr().err

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "stream_tensors", fail)
    argv[-1] = str(tmp_path / "new/b.safetensors")
    assert (
        command.main(argv) == 2
        and "b.safetensors: No space left on device" in capsys.readouterr().err
    )
    argv[-1] = "/proc/none/a.safetensors"
    assert command.main(argv) == 2 and "--out /proc/none: No such file" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["a.safetensors"]
