"""VisualCloze in JAX: grids of example pictures in, the blank cell painted out.

Importing this package imports neither JAX nor Flax; asking it for `Pipeline` does.
"""

__version__ = "0.1.0"
__all__ = ["Pipeline"]


def __getattr__(name):
    if name == "Pipeline":
        from vcloze_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
