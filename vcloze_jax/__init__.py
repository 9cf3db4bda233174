"""VisualCloze in JAX: grids of example pictures in, the blank cell painted out.

Importing this package imports neither JAX nor Flax.
"""

__version__ = "0.1.0"
