"""Eight virtual CPU devices, set before any test touches JAX, and one compile cache for all."""

import os
import tempfile

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
CACHE = os.path.join(tempfile.gettempdir(), "vcloze_jax_test_cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
