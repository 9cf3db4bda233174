"""What benchmarks/cpu.py and gpu.py ask of ours and of diffusers alike: sizes, inputs, clocks.

Knows neither JAX nor torch.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from vcloze_jax.config import FLUX_FILL, FluxConfig

CHANNELS, LATENT = 384, 64  # of FLUX.1-Fill: latent, condition and mask; latent alone
TIME, GUIDANCE = 0.7, 30.0
STEPS = 30


@dataclass(frozen=True)
class Case:
    """An MMDiT and the grids that it is given; by default FLUX.1-Fill and the paper's 3 x 3."""

    width: int = 3072
    heads: int = 24
    double: int = 19
    single: int = 38
    text_width: int = 4096
    vec_width: int = 768
    text: int = 512  # tokens
    rows: int = 3
    columns: int = 3
    side: int = 384  # pixels of a cell
    rank: int = 256
    batch: int = 1

    @property
    def image(self):
        """Tokens of a grid."""
        return self.rows * self.columns * (self.side // 16) ** 2

    @property
    def flops(self):
        """Of the products of a forward pass without an adapter, a multiplication with its addition
        counted as two."""
        d, blocks, tokens = self.width, self.double + self.single, self.image + self.text
        linear = 2 * blocks * 12 * d * d * tokens
        ends = 2 * d * (self.image * (CHANNELS + LATENT) + self.text * self.text_width)
        return self.batch * (linear + ends + 4 * tokens**2 * d * blocks)

    def preset(self, remat):
        """FLUX.1-Fill's, of these sizes; its adapter as training has it."""
        sizes = dict(double_blocks=self.double, single_blocks=self.single, remat=remat)
        text = dict(text_width=self.text_width, vec_width=self.vec_width)
        return replace(
            FLUX_FILL,
            flux=FluxConfig(CHANNELS, LATENT, self.width, self.heads, **sizes, **text),
            t5=replace(FLUX_FILL.t5, width=self.text_width, max_length=self.text),
            recipe=replace(FLUX_FILL.recipe, rank=self.rank, remat=remat, resolution=self.side),
        )

    def inputs(self):
        """float32 image [B, S, 384], text [B, T, text_width], pooled [B, vec_width], never zeros;
        positions [S, 3] of rows that are numbered from 1."""
        rng = np.random.default_rng(0)
        sizes = (self.image, CHANNELS), (self.text, self.text_width), (self.vec_width,)
        draws = [rng.standard_normal((self.batch, *size), np.float32) for size in sizes]
        side = self.side // 16
        row, y, x = np.mgrid[1 : self.rows + 1, :side, : self.columns * side]
        return *draws, np.stack([row, y, x], -1).reshape(-1, 3).astype(np.float32)


def measure(call, repeats, warm=2):
    """Seconds of calls that each wait for their end, and of all this process's threads: what a
    loaded machine makes longer, and what it does not."""
    for _ in range(warm):
        call()
    wall, cpu = [], []
    for _ in range(repeats):
        start, before = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    return wall, cpu


def tell(who, what, times, flops=None, **more):
    """Print a line of JSON: milliseconds, TFLOP/s at the median where FLOPs are given."""
    wall, cpu = times
    line = {"who": who, "what": what, "median_ms": 1e3 * statistics.median(wall)}
    line |= {"min_ms": 1e3 * min(wall), "max_ms": 1e3 * max(wall), "cpu_min_ms": 1e3 * min(cpu)}
    if flops:
        line["tflops"] = flops / statistics.median(wall) / 1e12
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(rounded | more), flush=True)
