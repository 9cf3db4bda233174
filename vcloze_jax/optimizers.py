"""What turns a step's gradient into its update, u of w - rate * u: AdamW, or Muon.

Muon moves a matrix by the nearest orthogonal one to its momentum, so that all directions in which
the gradient has anything to say are learnt alike, not the loudest first. It is for what multiplies
hidden activations, the blocks' products; all else, modulations, embeddings, the last layer, biases
and norms, is Adam's. Law: it knows paths and shapes of a trainable tree, and no room of ours.

Source: KellerJordan/Muon:muon.py, by optax; the scale is arXiv 2502.16982's, section 2.2.
"""

import re

import jax
import optax
from optax import contrib

# Path of a matrix of all layers -> the axes that it reads and that it makes. What is neither is of
# matrices apart: layers, and q, k, v or the parts of an MLP beside them, of [D, D] each.
MATRICES = tuple(
    (re.compile(rf"(^|/)(double|single)/(.+/)?{name}/kernel$"), contrib.MuonDimensionNumbers(*axes))
    for name, *axes in (
        ("(qkv|linear1)", (1,), (3, 4)),  # [layers, D, 3 or 7, H, K]
        ("proj", (1, 2), (3,)),  # [layers, H, K, D]
        ("linear2", (2, 3), (4,)),  # [layers, 5, H, K, D]
        ("(mlp_in|mlp_out)", (1,), (2,)),  # [layers, D, 4D], [layers, 4D, D]
    )
)
# Root mean square of Muon's update, about that of Adam's, so that one --lr is for both.
RMS = 0.2


def make_optimizer(clip, weight_decay=0.0, name="adam"):
    """AdamW behind a clip of the norm; who updates knows the rate (lzyhha/VisualCloze:train.py). By
    the name "muon" Adam leaves the matrices to it."""
    scale = adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    if name == "muon":
        # At a rate of -1 its update is u. It has matrices alone: its own Adam is Nesterov's.
        muon = contrib.muon(-1.0, consistent_rms=RMS, muon_weight_dimension_numbers=matrix_axes)
        scale = optax.partition({"muon": muon, "adam": adam}, choose_labels)
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), scale, decay)


def matrix_axes(tree):
    """MuonDimensionNumbers for every leaf of a tree {"flux": ...} that is Muon's, None for others;
    optax asks for them where others are masked out."""

    def of(path, _):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((axes for pattern, axes in MATRICES if pattern.search(path)), None)

    return jax.tree_util.tree_map_with_path(of, tree)


def choose_labels(tree):
    """Whose every leaf is."""
    name = lambda axes: "adam" if axes is None else "muon"  # noqa: E731
    is_leaf = lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(name, matrix_axes(tree), is_leaf=is_leaf)
