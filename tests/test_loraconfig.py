"""What stands beside an adapter's tensors is obeyed, or refused by name: PEFT's LoraConfig."""

import json
import re
from pathlib import Path

import lorafiles
import numpy as np
import pytest
from lorafiles import PLAIN, edited, same_trees
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import UserError
from vcloze_jax.inputs.cli import file_and_scale
from vcloze_jax.ports import __main__ as command
from vcloze_jax.storage import adapters, places

Q = "transformer_blocks.0.attn.to_q"
CLIPPED = "time_text_embed.text_embedder.linear_1"  # whose width is below the rank
PUBLISHED = {  # what PEFT 0.21 writes of an adapter of rank 11, entry for entry
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "FluxTransformer2DModel"}, "base_model_name_or_path": "x",
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": "gaussian", "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 22,
    "lora_bias": False, "lora_dropout": 0.1, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 11,
    "rank_pattern": {CLIPPED: 10}, "revision": None, "target_modules": ["to_q"],
    "target_parameters": None, "task_type": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return lorafiles.adapter(bias=False)


def folder_of(folder, tree, name="adapter_model.safetensors", **entries):
    """A folder as PEFT saves it: tensors without a header, and adapter_config.json."""
    folder.mkdir(exist_ok=True)
    file = lorafiles.written(folder, tree, bias=False)
    save_file(
        {
            f"base_model.model.{k.removeprefix('transformer.')}": x
            for k, x in load_file(file).items()
        },
        folder / name,
    )
    file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps(PUBLISHED | entries))
    return folder


def strength(path, tree):
    """How many times the trained B A an adapter has, of to_q in block 0 and of all but it in a
    single block."""
    adapter = adapters.load(path, PLAIN)
    pairs = [(adapter["double"]["img"]["qkv"], tree["double"]["img"]["qkv"], slice(0, 16))]
    pairs += [(adapter["single"]["linear1"], tree["single"]["linear1"], slice(16, 112))]
    deltas = [
        [(x["lora_a"][0] @ np.float64(x["lora_b"][0]).reshape(11, -1))[:, span] for x in pair]
        for *pair, span in pairs
    ]
    found = [np.sum(ours * base) / np.sum(base * base) for ours, base in deltas]
    for scale, (ours, base) in zip(found, deltas, strict=True):
        np.testing.assert_allclose(ours, scale * base, rtol=1e-5, atol=1e-4)
    return found


STRONG = {  # entries -> how strong to_q of block 0 and the other layers are
    "alpha": (dict(lora_alpha=64), 64 / 11, 64 / 11),
    "pattern": (dict(alpha_pattern={"to_q": 3}), 3 / 11, 2),
    "pattern from the start": (dict(alpha_pattern={f"^{Q}": 3, "to_q": 5}), 3 / 11, 2),
    "rank-stabilised": (dict(use_rslora=True), 22 / 11**0.5, 22 / 11**0.5),
    "both": (dict(use_rslora=True, alpha_pattern={"to_q": 5.5}), 5.5 / 11**0.5, 22 / 11**0.5),
}


@pytest.mark.parametrize("kind", STRONG)
def test_the_sidecar_says_how_strong(tmp_path, tree, kind):
    """A folder of PEFT has the strength that its adapter_config.json says, named by the folder or
    by the file, and also when `python -m ports lora` made another file of it."""
    entries, *expected = STRONG[kind]
    folder = folder_of(tmp_path / "peft", tree, **entries)
    assert file_and_scale(f"{folder}:0.5") == (folder, 0.5)
    for path in (folder, folder / "adapter_model.safetensors"):
        np.testing.assert_allclose(strength(path, tree), expected, rtol=1e-6)
    out = tmp_path / "diffusers.safetensors"
    assert command.main(["lora", str(folder), "--to", "diffusers", "--out", str(out)]) == 0
    np.testing.assert_allclose(strength(out, tree), expected, rtol=1e-6)


def test_ranks_of_the_sidecar(tmp_path, tree):
    """Ranks are those of the tensors; a config that says others was made for another file."""
    folder = folder_of(tmp_path / "peft", tree, r=4, rank_pattern={CLIPPED: 10, ".*": 11})
    np.testing.assert_allclose(strength(folder, tree), [2, 2], rtol=1e-6)
    folder_of(folder, tree, rank_pattern={CLIPPED: 10, "to_q": 4})
    with pytest.raises(UserError, match=f"{Q} is of rank 11, but adapter_config.json says 4"):
        adapters.check(folder, PLAIN)


def test_a_sidecar_of_its_own_file(tmp_path, tree):
    """adapter_config.json is of adapter_model beside it; of a file of another name only where that
    lies there alone."""
    folder = folder_of(tmp_path / "peft", tree, "renamed.safetensors")
    np.testing.assert_allclose(strength(folder / "renamed.safetensors", tree), [2, 2], rtol=1e-6)
    folder_of(folder, tree)
    np.testing.assert_allclose(strength(folder / "renamed.safetensors", tree), [1, 1], rtol=1e-6)
    np.testing.assert_allclose(strength(folder, tree), [2, 2], rtol=1e-6)


REFUSED = {
    "DoRA": (dict(use_dora=True), "use_dora is True, only False can be read (a DoRA"),
    "fan": (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "bias": (dict(bias="lora_only"), "bias is 'lora_only', only 'none' can be read"),
    "bias on B": (dict(lora_bias=True), "lora_bias is True in adapter_config.json, but no key"),
    "LoKr": (dict(peft_type="LOKR"), "peft_type is 'LOKR', only 'LORA'"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "QALoRA": (dict(use_qalora=True), "use_qalora is True, an entry that is not known"),
    "replication": (dict(layer_replication=[[0, 1]]), "layer_replication is [[0, 1]]"),
    "whole modules": (dict(modules_to_save=["proj_out"]), "modules_to_save is ['proj_out']"),
    "tomorrow's": (dict(lora_gamma=2), "lora_gamma is 2, an entry that is not known"),
    "no alpha": (dict(lora_alpha=None), "says no lora_alpha"),
    "text": (dict(lora_alpha="x"), "is not a LoraConfig"),
    "NaN": (dict(lora_alpha=float("nan")), "an alpha is not finite"),
    "pattern": (dict(alpha_pattern={"(": 1}), "is not a LoraConfig"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_honoured(tmp_path, tree, kind):
    """An entry that says what we cannot do is refused in one line with its name."""
    entries, words = REFUSED[kind]
    folder = folder_of(tmp_path / "peft", tree, **entries)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        adapters.check(folder, PLAIN)
    message = str(error.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    assert "adapter_config.json" in message


def test_two_that_disagree(tmp_path, tree):
    """Header, sidecar and alpha tensors that say the same are one; that disagree, an error."""
    folder = folder_of(tmp_path / "peft", tree)
    file = folder / "adapter_model.safetensors"
    edited(file, lambda d: d, lora_alpha=22, r=11, rank_pattern={CLIPPED: 10})
    np.testing.assert_allclose(strength(folder, tree), [2, 2], rtol=1e-6)
    key = f"base_model.model.{Q}.alpha"
    edited(
        file,
        lambda d: d | {key: np.full((), 22.0)},
        lora_alpha=22,
        r=11,
        rank_pattern={CLIPPED: 10},
    )
    np.testing.assert_allclose(strength(folder, tree), [2, 2], rtol=1e-6)
    edited(
        file, lambda d: d | {key: np.full((), 7.0)}, lora_alpha=22, r=11, rank_pattern={CLIPPED: 10}
    )
    with pytest.raises(UserError, match=f"{Q}.alpha is 7, but adapter_config.json says 22"):
        adapters.load(folder, PLAIN)
    edited(file, lambda d: d, lora_alpha=11, r=11, rank_pattern={CLIPPED: 10})
    with pytest.raises(UserError, match="its header and adapter_config.json disagree about alpha"):
        adapters.check(folder, PLAIN)


KOHYA = {  # what kohya's header says -> what is said of it, "" for nothing
    "half": (dict(ss_network_alpha="5.5", ss_network_dim="11"), "ss_network_alpha 5.5 .*FILE:0.5"),
    "the same": (dict(ss_network_alpha="11.0", ss_network_dim="11"), ""),
    "none": (dict(ss_network_alpha="None", ss_network_dim="11"), ""),
    "zero, which is the rank": (dict(ss_network_alpha="0", ss_network_dim="11"), ""),
    "resized": (dict(ss_network_alpha="Dynamic", ss_network_dim="Dynamic"), ""),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("kind", KOHYA)
def test_a_strength_that_kohyas_header_alone_says(tmp_path, tree, capsys, kind):
    """Without a tensor of it alpha is the rank, as for diffusers and for kohya's own loader; where
    the header says otherwise, one line tells how to get that."""
    header, message = KOHYA[kind]
    file = lorafiles.renamed(lorafiles.written(tmp_path, tree, bias=False), "kohya")
    alphas = load_file(file)
    save_file(alphas, file, metadata=header)
    adapters.check(file, PLAIN)
    assert capsys.readouterr().out == ""  # alphas among the tensors are the truth
    save_file({key: x for key, x in alphas.items() if not key.endswith(".alpha")}, file, header)
    out = tmp_path / "other.safetensors"
    for say in (
        lambda: adapters.check(file, PLAIN),
        lambda: command.main(["lora", str(file), "--to", "diffusers", "--out", str(out)]),
    ):
        say()
        told = capsys.readouterr().out
        lines = [line for line in told.splitlines() if "no tensor is an alpha" in line]
        assert len(lines) == bool(message) and re.search(message, told)
    np.testing.assert_allclose(strength(file, tree), [1, 1], rtol=1e-6)


def test_a_header_that_is_no_json(tmp_path, tree):
    """It is told where it breaks, in our words."""
    file = lorafiles.written(tmp_path, tree, bias=False)
    save_file(load_file(file), file, metadata={lorafiles.LORA: '{"r": 11,}'})
    words = "lora_adapter_metadata in its header is no JSON from column 10 of line 1 on; save it"
    with pytest.raises(UserError, match=words):
        adapters.check(file, PLAIN)


@pytest.mark.parametrize("zero", ["lora_B", "alpha"])
def test_an_adapter_that_changes_nothing_is_said_to(tmp_path, tree, capsys, zero):
    """Of B that was never trained, or an alpha of 0, which kohya would take for the rank."""
    file = lorafiles.written(tmp_path, tree, bias=False)
    adapters.load(file, PLAIN)
    assert capsys.readouterr().out == ""
    entries = {} if zero == "lora_B" else dict(lora_alpha=0)
    edited(file, lambda d: {key: x * (zero not in key) for key, x in d.items()}, **entries)
    adapters.load(file, PLAIN)
    assert capsys.readouterr().out.count("so that it changes nothing") == 1


def test_folders(tmp_path, tree):
    """A folder of diffusers is its file; one with two adapters or none says so."""
    file = lorafiles.written(tmp_path, tree, bias=False)
    (tmp_path / "one").mkdir()
    file.rename(tmp_path / "one/pytorch_lora_weights.safetensors")
    same_trees(adapters.load(tmp_path / "one", PLAIN), tree)
    folder_of(tmp_path / "one", tree)
    for path, words in (
        (tmp_path, "a folder, not an adapter file, and holds none of adapter_model.safetensors"),
        (tmp_path / "one", "adapter_model.safetensors and pytorch_lora_weights.safetensors; name"),
    ):
        with pytest.raises(UserError, match=words):
            adapters.check(path, PLAIN)


def test_two_adapters_in_one(tmp_path, tree):
    """Two keys that are one without what wraps them are both named."""
    file = lorafiles.written(tmp_path, tree, bias=False)
    key = f"transformer.{Q}.lora_A"
    edited(file, lambda d: d | {f"{key}.b.weight": d[f"{key}.weight"]})
    with pytest.raises(UserError, match=rf"{key}\.(b\.)?weight and {key}\.(b\.)?weight are both"):
        adapters.check(file, PLAIN)


@pytest.mark.parity
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_what_peft_writes_is_read(tmp_path, tree, changes):
    """The adapter_config.json of the installed PEFT, whatever it writes by default."""
    peft = pytest.importorskip("peft")
    ranks = {"r": 11, "rank_pattern": {CLIPPED: 10}}
    config = peft.LoraConfig(**ranks, lora_alpha=22, target_modules=["to_q"], **changes)
    folder = folder_of(tmp_path / "peft", tree)
    (folder / "adapter_config.json").unlink()
    config.save_pretrained(folder)
    adapters.check(folder, PLAIN)


def test_a_folder_is_known_by_all_its_tensors(tmp_path):
    """The digest of an adapter's folder sees its tensors, whatever PEFT called their file."""
    (tmp_path / "adapter_config.json").write_text("{}")
    digests = set()
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        for content in (b"1", b"2"):
            (tmp_path / name).write_bytes(content)
            digests.add(places.digest_files(tmp_path))
    assert len(digests) == 4


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("fox/FLUX.1-style", "hf download fox/FLUX.1-style --local-dir FLUX.1-style"),
        ("fox/style/a.safetensors", "hf download fox/style a.safetensors --local-dir ."),
        ("there.safetensors:0.5", "training takes no :SCALE"),
        ("there.safetensors:0,5", "SCALE is a number, as in :0.5"),
        ("there", "there is 'there.safetensors'"),
        ("https:/civitai.com/models/1", "it is a URL: download it first"),
        ("There.safetensors", "there is 'there.safetensors'"),
    ],
)
def test_an_adapter_that_is_not_there(tmp_path, monkeypatch, name, remedy):
    """The line says what would do, of a hub's id, a scale or a name that is nearly right."""
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: there is no such adapter; .*{remedy}"):
        adapters.check(Path(name), PLAIN)
