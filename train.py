"""Train VisualCloze: an adapter (or, with --rank 0, the MMDiT) on grids, by masked flow matching.

    python train.py --mesh 8                                 # mini, on a task it never saw
    python train.py --mesh 8 --data graphemoji               # the visual cloze on mini's base
    python train.py --preset flux-fill --weights FLUX.1-Fill-dev --data mine.jsonl --mesh 8

The run lives in --out; the same command again resumes it, to the bit. It ends with
RUN/lora.safetensors, which sample.py --lora and diffusers load.
"""

from dataclasses import replace
from pathlib import Path

from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.data.sources import open_source
from vcloze_jax.grid import PATCH
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.runfolder import Settings, compare
from vcloze_jax.storage import places


def parse(argv):
    p = cli.Parser(__doc__)
    add = p.add_argument
    mesh = "8, or data=2,fsdp=2,tensor=2 (default: all accelerators, or one CPU device)"
    add("--mesh", help=f"{mesh}; virtual CPU devices are made where there is no accelerator")
    add("--out", type=Path, metavar="RUN", help="the run's folder (default: runs/PRESET)")
    add("--check", action="store_true", help="validate everything, train nothing")
    add("--plan", action="store_true", help="print tokens, FLOPs and bytes of a step, and exit")

    add = p.add_argument_group("start from").add_argument
    add("--preset", choices=PRESETS, default="mini")
    add("--weights", type=Path, metavar="DIR", help="folder in diffusers' layout (default: mini's)")
    add("--lora", type=Path, metavar="FILE", help="go on from this adapter")
    scratch = "random MMDiT and text encoders, all trained; the VAE is that of --weights"
    add("--from-scratch", action="store_true", help=scratch)

    add = p.add_argument_group("data").add_argument
    add("--data", help="graphemoji, graphemoji:TASK, graphemoji-fill, or a JSON-lines file")
    add("--resolution", type=int, help="a cell's area is its square; for JSON-lines data")

    add = p.add_argument_group("recipe (defaults are the preset's)").add_argument
    add("--rank", type=int, help="of the adapter; 0 trains the MMDiT itself")
    add("--lr", type=float, help="learning rate")
    add("--batch", type=int, help="grids per step")
    add("--micro-batch", type=int, help="grids at a time; --batch is a multiple")
    add("--steps", type=int, help="optimizer steps in all")
    region = "the masked pixels, or all rows as in the authors' code"
    add("--loss-region", choices=("target", "grid"), default="target", help=region)
    add("--seed", type=int, default=0)
    add("--save-every", type=int, metavar="STEPS")
    add("--preview-every", type=int, metavar="STEPS")
    return p.parse_args(argv)


def settle(args, preset):
    """Flags over the preset's defaults -> Settings. Raises UserError that names the flag."""
    s = dict(vars(preset.train), rank=0 if args.from_scratch else preset.train.rank)
    s |= dict(resolution=preset.resolution, mesh="", lora=None)
    s |= {key: value for key, value in vars(args).items() if value is not None}
    s["weights"] = str(args.weights.resolve() if args.weights else "mini")
    s["lora"] = args.lora and str(args.lora.resolve())
    s["micro_batch"] = min(s["micro_batch"], s["batch"])
    lows = dict(batch=1, micro_batch=1, steps=1, resolution=PATCH, save_every=1, preview_every=1)
    for key, low in lows.items():
        if s[key] < low:
            raise UserError(f"--{key.replace('_', '-')} {s[key]}: must be at least {low}")
    if s["rank"] < 0 or not 0 <= s["seed"] < 2**32 or not 0 < s["lr"] < 1:
        raise UserError("--rank from 0, --seed in 0 … 2^32-1, --lr between 0 and 1")
    if s["batch"] % s["micro_batch"]:
        raise UserError(f"--batch {s['batch']}: not a multiple of --micro-batch {s['micro_batch']}")
    if args.from_scratch and (s["rank"] or s["lora"]):
        raise UserError("--from-scratch trains every weight: leave --rank and --lora away")
    return Settings(**{field: s[field] for field in Settings.__dataclass_fields__})


def main(argv):
    args = parse(argv)
    if args.weights is None and args.preset != "mini":
        raise UserError(f"--preset {args.preset}: its weights are yours; add --weights DIR")
    settings = settle(args, PRESETS[args.preset])
    out = args.out or Path("runs", args.preset)
    compare(out, settings)
    dropout = PRESETS[args.preset].flow.caption_dropout
    data = open_source(settings.data, settings.resolution, dropout)

    from vcloze_jax import plan  # JAX from here on
    from vcloze_jax.run import Run
    from vcloze_jax.sharding import make_mesh, parse_mesh
    from vcloze_jax.storage import adapters, weights
    from vcloze_jax.storage.preset import read_config

    mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else None)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.micro_batch % shards:
        raise UserError(f"--micro-batch {settings.micro_batch}: a multiple of {shards}, please")
    folder = args.weights or places.MINI
    if args.from_scratch:
        preset = PRESETS[args.preset]
        preset = replace(preset, vae=read_config(folder, "vae", preset.vae))
    else:
        preset = weights.check_fill(folder)
        if preset.name != args.preset:
            raise UserError(f"{folder}: its preset is {preset.name}; add --preset {preset.name}")
        print(f"weights: {weights.summary(folder, preset)}")
    preset = replace(preset, resolution=settings.resolution)
    if args.lora:
        adapters.check(args.lora, preset.flux)
    held_out = data.held_out()
    if args.plan:
        print(plan.training(preset, settings, held_out, mesh))
        return 0
    if args.check:
        return 0
    return Run(out, settings, preset, folder, mesh, data, held_out).train()


if __name__ == "__main__":
    cli.run(main)
