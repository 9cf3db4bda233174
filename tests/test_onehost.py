"""Laws of a host that is alone, also in a cluster, and of what a host may write to."""

import jax
import pytest
from runs import ROOT

import sample
import train
from vcloze_jax import demo, evaluate, hosts
from vcloze_jax.config import UserError
from vcloze_jax.data import __main__ as data
from vcloze_jax.inputs import cluster
from vcloze_jax.ports import __main__ as ports
from vcloze_jax.study import __main__ as study


def test_alone(monkeypatch):
    """A process that is alone, also in a cluster, joins nobody and answers itself; where there are
    others that it cannot find, it says so."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(1))
    monkeypatch.setattr(cluster, "CHIPS", ())
    for name in {*cluster.SIGNS, *cluster.COUNTS}:
        monkeypatch.delenv(name, raising=False)
    hosts.join_hosts()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.join_hosts()
    assert not joined and hosts.is_first() and hosts.tell_all("a") == ["a"]
    with pytest.raises(ZeroDivisionError), hosts.agreed():
        1 / 0  # noqa: B018

    def fail(**_):
        raise RuntimeError("no coordinator")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match=r"do not find each other \(no coordinator\); start one"):
        hosts.join_hosts()


WRITERS = {
    "train": (train.main, "--out {}/run"),
    "its cache": (train.main, "--data examples/pairs --cache {}/run"),
    "sample": (sample.main, "--grid examples/1_no_example.json --out {}/run"),
    "demo": (demo.main, "--out {}/run"),
    "evaluate": (evaluate.main, "--out {}/run"),
    "evaluate, own data": (evaluate.main, "--data examples/pairs --out {}/run"),
    "study": (study.main, "dial --out {}/run"),
    "data": (data.main, "--degrade examples/result.png --out {}/sheet.png"),
    "ports": (ports.main, "vcloze_jax/mini --out {}/run"),
    "ports lora": (
        ports.main,
        "lora vcloze_jax/mini/lora.safetensors --to diffusers --out {}/run.safetensors",
    ),
}


@pytest.mark.parametrize("door", WRITERS)
def test_no_bucket(monkeypatch, call, door):
    """An object store is refused by name by all that writes, on every host, before JAX and before
    anything is made: nothing there is renamed."""
    monkeypatch.chdir(ROOT)
    before = sorted(ROOT.iterdir())
    main, argv = WRITERS[door]
    for hosts_ in ("1", "2"):
        monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
        monkeypatch.setenv("SLURM_NTASKS", hosts_)
        for address in ("gs://bucket", "s3://bucket/a", "hf:/"):
            code, _, error = call(main, argv.format(address))
            told = address.replace("//", "/").rstrip("/")
            assert code == 2 and error.count("\n") == 1, error
            assert f" {told}" in error and ": an address, not a path" in error, error
            assert "no bucket" in error
    assert sorted(ROOT.iterdir()) == before
