"""`python -m ports SRC --out DST`: weights of any kind that is known, as a folder of ours.

Our folder is diffusers' layout in bfloat16, every key checked, at most 10 GB a file: it loads
onto a mesh as it is, in diffusers too.
"""

import argparse
import shutil
import sys
from pathlib import Path

from vcloze_jax.config import UserError


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m ports", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="a weights folder")
    parser.add_argument("--out", type=Path, metavar="DST", required=True, help="a new folder")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: a complete weights folder")
    return 0


def convert(source: Path, out: Path):
    """Write `out` from the weights folder `source`; UserError if either is not as it must be."""
    from ports import read
    from vcloze_jax import weights

    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    preset = weights.check(source)
    part_of = out.with_name(out.name + ".part")
    shutil.rmtree(part_of, ignore_errors=True)
    names = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.msgpack", "*.gguf"]
    shutil.copytree(source, part_of, ignore=shutil.ignore_patterns(*names, ".*"))
    for field, (module, part) in weights.MODELS.items():
        file, _, _, leaves = weights.plan(module, getattr(preset, field), source)
        with weights.told(file.path):
            arrays = ((leaf.path, read.fetch(leaf, file)) for leaf in leaves)
            tensors = read.export(part.table, arrays)
            read.write(part_of / part.folder, part.stem, tensors, "bfloat16")
    part_of.rename(out)


if __name__ == "__main__":
    sys.exit(main())
