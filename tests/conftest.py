"""Eight virtual CPU devices, set before any test touches JAX, and one compile cache for all."""

import os
import tempfile

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
CACHE = os.path.join(tempfile.gettempdir(), "vcloze_jax_test_cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ["XDG_CACHE_HOME"] = CACHE  # of text embeddings: the tests' own

import jax  # noqa: E402
import pytest  # noqa: E402

from vcloze_jax.devices import ready_xla  # noqa: E402

ready_xla(8)  # now, so that test processes of any mesh share their compiled programs
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Tiny random models in diffusers' layout, float32 (tests/folders.py); not to be changed."""
    import folders

    folder = tmp_path_factory.mktemp("diffusers")
    folders.save(folder)
    return folder


@pytest.fixture(scope="session")
def bfl(saved, tmp_path_factory):
    """The same models with BFL's single files; not to be changed."""
    import folders

    folder = tmp_path_factory.mktemp("bfl")
    folders.save_bfl(saved, folder)
    return folder
