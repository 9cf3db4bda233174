"""Paint the blank cells of grids of example pictures.

    python sample.py --grid examples/*.json                  # the shipped mini model, on any CPU
    python sample.py --grid fox.json --weights FLUX.1-Fill-dev --lora visualcloze.safetensors

A spec holds rows of pictures; in its last row, null is what will be painted:
    {"image": [["a_gray.png", "a.png"], ["b_gray.png", null]], "task_prompt": "In each row, …"}
For fox.json, --out gets fox.png (the grid), fox_target0.png … and fox.json (a record, a spec too).
"""

from pathlib import Path

from vcloze_jax.inputs import cli
from vcloze_jax.inputs.specfiles import add_spec_flags, check_outputs, read_changes, read_specs
from vcloze_jax.inputs.tasks import describe_tasks


def parse(argv):
    p = cli.Parser(__doc__)
    p.add_argument("--grid", nargs="+", action="extend", type=cli.path, metavar="SPEC.json")
    cli.add_model_flags(p)
    add_spec_flags(p)
    p.add_argument("--out", type=cli.path, default=Path("outputs"), metavar="DIR")
    p.add_argument("--film", action="store_true", help="NAME_film.webp, too: all steps of a grid")
    p.add_argument("--dial", action="store_true", help="record how far examples and noise move it")
    p.add_argument("--list-tasks", action="store_true", help='names for "task" in a spec')
    p.add_argument("--check", action="store_true", help="validate everything, paint nothing")
    p.add_argument("--offload", action="store_true", help="slower; FLUX paints on 24 GB")
    cli.add_plan_flags(p, cli.PRESETS)
    args = p.parse_args(argv)
    if not args.grid and not args.list_tasks:
        p.error("--grid SPEC.json is needed")
    return args


def main(argv):
    args = parse(argv)
    preset = cli.read_preset(args)
    if args.list_tasks:
        return print(describe_tasks(preset))
    specs = read_specs(args.grid, preset, read_changes(args))
    check_outputs(args.out, specs, args.film)

    from vcloze_jax import plan
    from vcloze_jax.film import Film
    from vcloze_jax.pipeline import Pipeline
    from vcloze_jax.programs import tally  # JAX from here on

    if args.plan:
        return print(plan.describe_sampling(args, preset, specs))
    pipeline = Pipeline.load(cli.fetch_weights(args), args.lora, args.mesh, args.offload)
    print(pipeline.summary())
    if args.check:
        return
    on_step = Film(args.out) if args.film else None
    paintings = pipeline.paint(specs, progress=True, on_step=on_step, dial=args.dial)
    for spec, painting in zip(specs, paintings, strict=True):
        painting.save(args.out, spec.name)
        for sentence in painting.remarks:
            print(f"{spec.name}: {sentence}")
    print(f"{len(specs)} grids painted, {tally['compiled']} programs compiled: {args.out}/")


if __name__ == "__main__":
    cli.run(main)
