"""A mini base of 64 channels, for the placements that keep conditions clean: DIR.

    python scripts/derive_clean_base.py DIR
    python train.py --weights DIR --placement dev

It is cut out of the shipped one and its adapter, folded in; untrained it paints noise.
"""

import sys
from pathlib import Path

from vcloze_jax.storage import weights
from vcloze_jax.storage.cleanbase import derive_clean_base

if __name__ == "__main__":
    out = Path(sys.argv[1])
    derive_clean_base(out)
    print(weights.summary(out, weights.checked_preset(out)))
