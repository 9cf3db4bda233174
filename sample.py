"""Paint the blank cells of grids of example pictures.

    python sample.py --grid examples/*.json                  # the shipped mini model, on any CPU
    python sample.py --grid fox.json --weights FLUX.1-Fill-dev --lora visualcloze.safetensors

A spec holds rows of pictures; in its last row, null is what will be painted:
    {"image": [["a_gray.png", "a.png"], ["b_gray.png", null]], "task_prompt": "In each row, …"}
For fox.json, --out gets fox.png (the grid), fox_target0.png … and fox.json (the record).
"""

from pathlib import Path

from vcloze_jax import prompts
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.spec import check_outputs, read_specs
from vcloze_jax.storage import places


def parse(argv):
    p = cli.Parser(__doc__)
    p.add_argument("--grid", nargs="+", type=Path, metavar="SPEC.json", default=[])
    cli.add_model_flags(p)
    p.add_argument("--out", type=cli.local_folder, default=Path("outputs"), metavar="DIR")
    p.add_argument("--list-tasks", action="store_true", help='names for "task" in a spec')
    p.add_argument("--check", action="store_true", help="validate everything, paint nothing")
    p.add_argument("--plan", action="store_true", help="print tokens, FLOPs and bytes, and exit")
    args = p.parse_args(argv)
    if not args.grid and not args.list_tasks:
        p.error("--grid SPEC.json is needed")
    return args


def main(argv):
    args = parse(argv)
    if args.list_tasks:
        for name, task in prompts.TASKS.items():
            print(f"{name} ({task.columns} columns): {task.prompt}")
        return
    specs = read_specs(args.grid, places.named_preset(args.weights or places.MINI_FOLDER))
    check_outputs(args.out, specs)

    from vcloze_jax import plan
    from vcloze_jax.pipeline import Pipeline, steps_bar
    from vcloze_jax.programs import spent
    from vcloze_jax.storage import weights  # JAX from here on

    pipeline = Pipeline.load(args.weights, args.lora, args.mesh)
    print(
        f"weights: {weights.summary(args.weights or places.MINI_FOLDER, pipeline.painter.preset)}"
    )
    if args.plan:
        print(plan.sampling(pipeline.painter.preset, specs, pipeline.painter.mesh))
    if args.check or args.plan:
        return
    for spec, painting in zip(specs, pipeline.paint(specs, steps_bar), strict=True):
        painting.save(args.out, spec.name)
        for sentence in painting.unread:
            print(f"{spec.name}: {sentence}")
    print(f"{len(specs)} grids painted, {spent['programs']} programs compiled: {args.out}/")


if __name__ == "__main__":
    cli.run(main)
