"""Eight chips of a v5e that are not here, for the tests that compile for them."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from vcloze_jax.sharding import AXES


@contextmanager
def v5e(monkeypatch):
    """Within, their mesh is set, all on fsdp, and no program is kept, or found: one for a machine
    that is not here cannot be taken up. Skips where the compiler is missing."""
    pytest.importorskip("libtpu")  # pip install '.[tpu-aot]'
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.reshape(chips, (1, 1, 8, 1)), AXES, (AxisType.Auto,) * len(AXES))
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it would not look at that setting again
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
