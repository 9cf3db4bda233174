"""Paint the blank cells of grids of example pictures.

    python sample.py --grid examples/*.json                  # the shipped mini model, on any CPU
    python sample.py --grid fox.json --weights FLUX.1-Fill-dev --lora visualcloze.safetensors

A spec holds rows of pictures; in its last row, null is what will be painted:
    {"image": [["a_gray.png", "a.png"], ["b_gray.png", null]], "task_prompt": "In each row, …"}
For fox.json, --out gets fox.png (the grid), fox_target0.png … and fox.json (a record, a spec too).
"""

from vcloze_jax.inputs import cli
from vcloze_jax.inputs.specfiles import check_commands, read_changes, read_specs
from vcloze_jax.inputs.specfiles import parse_sampling as parse
from vcloze_jax.inputs.tasks import describe_tasks


def main(argv):
    """Files -> Specs (grid.py), by inputs/spec.py. Specs -> pictures, by painter.py and, below it,
    conditioning, flow and model/: a Pipeline hands it the models, a Painting writes what comes."""
    args = parse(argv, __doc__)
    preset = cli.read_preset(args)
    if args.list_tasks:
        return print(describe_tasks(preset))
    specs = read_specs(args.grid, preset, read_changes(args))
    check_commands(args, specs)

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
