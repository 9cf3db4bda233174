"""train.py with its products in bfloat16, for a CPU that multiplies these fast.

    python scripts/train_bfloat16.py --data graphemoji --from-scratch ...

All flags are train.py's.
"""

import sys
from pathlib import Path

from vcloze_jax.inputs import cli
from vcloze_jax.train import main as train


def main(argv):
    from bfloat16_products import contract  # JAX from here on, once cli.run has told it its cache

    from vcloze_jax.model import layers

    layers.contract = contract
    sys.argv[0] = str(Path(__file__).parents[1] / "train.py")  # other commands lie beside that
    return train(argv)


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
