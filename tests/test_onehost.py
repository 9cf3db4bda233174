"""Laws of a host that is alone, also in a cluster, and of what a host may write to."""

import jax
import pytest

import train
from vcloze_jax import hosts
from vcloze_jax.config import UserError
from vcloze_jax.inputs import cluster


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


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run"])
def test_no_bucket(monkeypatch, call, address):
    """An object store is refused by name on every host, before JAX: nothing there is renamed."""
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    code, _, error = call(train.main, f"--out {address}")
    assert code == 2 and error.count("\n") == 1
    assert f"--out {address.replace('//', '/')}: an address" in error and "no bucket" in error
