"""Paint the blank cells of grids of example pictures.

    python sample.py --grid examples/*.json                  # the shipped mini model, on any CPU
    python sample.py --grid fox.json --weights FLUX.1-Fill-dev --lora visualcloze.safetensors

A spec holds rows of pictures; in its last row, null is what will be painted:
    {"image": [["a_gray.png", "a.png"], ["b_gray.png", null]], "task_prompt": "In each row, …"}
For fox.json, --out gets fox.png (the grid), fox_target0.png … and fox.json (the record).
"""

import json
from pathlib import Path

from vcloze_jax import cli, prompts
from vcloze_jax.config import UserError
from vcloze_jax.images import save_png, save_text
from vcloze_jax.spec import read_specs


def parse(argv):
    p = cli.Parser(__doc__)
    p.add_argument("--grid", nargs="+", type=Path, metavar="SPEC.json", default=[])
    cli.add_model_flags(p)
    p.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR")
    p.add_argument("--list-tasks", action="store_true", help='names for "task" in a spec')
    p.add_argument("--check", action="store_true", help="validate everything, paint nothing")
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
    folder, loras = cli.model_of(args)
    specs = read_specs(args.grid, cli.named_preset(folder))
    check_outputs(args.out, specs)

    from vcloze_jax.paint import Job, Painter, bar  # JAX from here on
    from vcloze_jax.sharding import make_mesh, parse_mesh
    from vcloze_jax.weights import check, check_lora, load_models

    mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else None)
    preset = check(folder)
    for file, _ in loras:
        check_lora(file, preset.flux)
    if args.check:
        return
    painter = Painter(*load_models(folder, preset, loras, mesh), mesh)
    jobs = [
        Job(s.grid, s.prompt, s.num_inference_steps, s.guidance_scale, s.seed, s.latents)
        for s in specs
    ]
    for spec, painted in zip(specs, painter(jobs, bar), strict=True):
        write(args.out, spec, painted)
    print(f"{len(specs)} grids painted, {painter.compiles} programs compiled: {args.out}/")


def check_outputs(out, specs):
    """Make the folder. Raises UserError where an output would replace an input."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from None
    inputs = set()
    for spec in specs:
        cells = (cell for row in spec.resolved["image"] for cell in row if cell)
        inputs.add(spec.source.resolve())
        for cell in cells:
            inputs.update(map(Path, cell.values() if isinstance(cell, dict) else [cell]))
    for spec in specs:
        targets = [f"_target{i}.png" for i in range(len(spec.grid.targets))]
        for suffix in (".json", ".png", *targets):
            if (out / f"{spec.name}{suffix}").resolve() in inputs:
                raise UserError(f"--out {out}: {spec.name}{suffix} is an input; choose another")


def write(out, spec, painted):
    """The grid, its targets, and last the record of one spec."""
    grid = spec.grid
    save_png(out / f"{spec.name}.png", grid.compose(painted.pixels))
    for i, target in enumerate(grid.cut(painted.pixels)):
        save_png(out / f"{spec.name}_target{i}.png", target)
    record = {
        "spec": spec.resolved,
        "prompt": spec.prompt,
        "sizes": [[width // grid.columns, height] for height, width in grid.shape],
        "boxes": grid.boxes,
        **painted.record,
    }
    save_text(out / f"{spec.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
