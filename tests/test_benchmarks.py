"""The benchmarks run, tiny, and what they count is right; TPUs' programs need libtpu (tpu-aot)."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

HLO = """HloModule jit_f

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, dimensions={0}
  %rs = (f32[8,4], f32[1,4]) reduce-scatter-start(%y), channel_id=2, dimensions={0}
}

%body_of_another (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  %fusion.2 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
}

%piece.1 (p: f32[1,4]) -> f32[8,4] {
  %all-gather.3 = f32[8,4]{1,0} all-gather(%x), channel_id=3, dimensions={0}
}

%piece.2 (p: f32[1,4]) -> f32[8,4] {
  %all-gather.4 = f32[8,4]{1,0} all-gather(%x), channel_id=3, dimensions={0}
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
}

ENTRY %main (a: f32[1,4]) -> f32[8,4] {
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%a), channel_id=4, dimensions={0}
  %while.1 = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body_of_another
}
"""


def run(name, *flags):
    command = [sys.executable, str(BENCHMARKS / name), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_collectives_are_counted_with_their_loops(monkeypatch):
    """What is in the body of a loop counts as often as it turns, whether its line says so or its
    condition; what is done in pieces counts once; bytes are what comes out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hlo

    found = hlo.count_collectives(HLO)
    gathers = [1 + 3 + 5, 2 * 32 + (3 + 5) * 4 * 32]
    assert found == {"all-gather": gathers, "reduce-scatter": [3, 3 * 16]}


needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="pip install '.[tpu-aot]'")


@needs_libtpu
@pytest.mark.slow
def test_programs_of_tpus():
    """Training and sampling compile for eight chips; attention is splash's kernels, of each kind of
    block forwards once and backwards once: remat light does not run it again. Weights and sums are
    all that moves between chips."""
    done = run("tpu_aot.py", "v5e:2x4", "--small", "--programs", "accumulate", "euler")
    assert done.returncode == 0, done.stderr
    train, sample = done.stdout.split("  accumulate:")[1].split("  euler:")
    assert "2 x splash_mha_fwd_segmented_residuals" in train
    assert "2 x splash_mha_dkv_segmented" in train
    assert "2 x splash_mha_fwd_segmented_no_residuals" in sample
    assert "all-gather" in train and "permute" not in train + sample


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    """FLUX.1-Fill with every result kept needs six times a v5e's memory, and is refused."""
    done = run("tpu_aot.py", "v5e:2x4", "--programs", "accumulate", "--keep-all")
    assert done.returncode == 1 and "refused" in done.stdout, done.stderr


@pytest.mark.slow
def test_gpus_by_arithmetic():
    """What is counted of one GPU is the peak that was measured there, 62.9 GiB, whose run held no
    text encoders; what has no measured temporaries is refused."""
    done = run("tpu_aot.py", "H100x1")
    assert done.returncode == 0, done.stderr
    parts = dict(re.findall(r"(\w+) ([\d.]+) GB", done.stdout.splitlines()[0]))
    total = sum(float(parts[name]) for name in parts if name != "t5")
    assert total == pytest.approx(62.9 * 2**30 / 1e9, rel=0.01)
    assert run("tpu_aot.py", "H100x8", "--per-chip", "2").returncode == 2


@pytest.mark.parity
def test_diffusers_is_timed_beside_us():
    """Both frameworks compute the same velocities of one folder, and their times are a row."""
    pytest.importorskip("peft")
    done = run("cpu.py", "--small", "--rounds", "1", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| 48 x 1 | ")
