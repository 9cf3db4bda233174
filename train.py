"""Train VisualCloze: an adapter (or, with --rank 0, the MMDiT) on grids, by masked flow matching.

    python train.py --mesh 8                                 # mini, on a task it never saw
    python train.py --mesh 8 --data graphemoji               # the visual cloze on mini's base
    python train.py --preset flux-fill --weights FLUX.1-Fill-dev --data mine.jsonl --mesh 8

The run lives in --out; the same command again resumes it, to the bit. It ends with
RUN/lora.safetensors, which sample.py --lora and diffusers load.
"""

from pathlib import Path

from tqdm import tqdm

from vcloze_jax.config import UserError
from vcloze_jax.data.sources import micro_batch, micro_batches, open_source
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.pictures import save_png
from vcloze_jax.inputs.runfolder import Log, RunFolder, Stop
from vcloze_jax.storage import places

PREVIEWS = 4  # held-out grids


def parse(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="RUN", help="the run's folder (default: runs/PRESET)")
    add("--check", action="store_true", help="validate everything, train nothing")
    add("--plan", action="store_true", help="print tokens, FLOPs and bytes of a step, and exit")
    cli.add_recipe_flags(parser)
    return parser.parse_args(argv)


def main(argv):
    """Check all that the user may have to correct, then load and train; returns the exit code."""
    args = parse(argv)
    recipe = cli.read_recipe(args)
    run = RunFolder(args.out or Path("runs", recipe.preset))
    run.compare(recipe)
    source = open_source(recipe.data, recipe.resolution, recipe.caption_dropout)

    from vcloze_jax import plan  # JAX from here on
    from vcloze_jax.sharding import make_mesh, parse_mesh
    from vcloze_jax.storage.models import check_for_training

    mesh = make_mesh(parse_mesh(recipe.mesh) if recipe.mesh else None)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.micro_batch % shards:
        raise UserError(f"--micro-batch {recipe.micro_batch}: a multiple of {shards}, please")
    folder = Path(args.weights or places.MINI)
    preset = check_for_training(folder, recipe)
    if args.plan:
        print(plan.training(preset, recipe, source.held_out(), mesh))
    if args.plan or args.check:
        return 0
    return learn(run, preset, folder, mesh, source)


def learn(run, preset, folder, mesh, source):
    """Load the models, take up the run where it stands, and train to its last step or a signal."""
    from vcloze_jax.painter import Painter
    from vcloze_jax.storage import checkpoint
    from vcloze_jax.storage.models import load_for_training, save_trained
    from vcloze_jax.storage.textreader import TextReader, Tokenizers
    from vcloze_jax.trainer import Trainer, preview_sheet, train

    recipe, tokenizers = preset.recipe, Tokenizers(folder, preset.t5, preset.clip)
    parts = load_for_training(preset, folder, mesh)
    trainer = Trainer(parts, preset, tokenizers, mesh, source.masks_every_row)
    run.create(recipe)  # after all that the user may have to correct
    trainer.step, trainer.state = checkpoint.resume(run.checkpoints, trainer.state)
    log = Log(run.metrics, trainer.step)
    if trainer.step == recipe.steps:
        print(f"{run.path}: finished at step {trainer.step}; a larger --steps goes on")
        return 0

    painter = Painter(preset, None, None, mesh)
    painter.read_texts = TextReader(tokenizers, lambda: painter.models.encoders(), painter.dtype)
    examples = micro_batch(source.held_out(), seed=0, index=0, size=PREVIEWS)
    bar = tqdm(total=recipe.steps, initial=trainer.step, unit="step", dynamic_ncols=True)

    def write(metrics):
        log.write(metrics)
        loss, norm = metrics["loss"], metrics["grad_norm"]
        bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.3f}", refresh=False)
        bar.update()

    def preview():
        painter.models = trainer.models()
        save_png(run.previews / f"{trainer.step:06d}.png", preview_sheet(painter, examples))

    def save():
        if trainer.step == recipe.steps:  # first: a run whose last step is saved is complete
            save_trained(run.path, trainer, folder)
        checkpoint.save(run.checkpoints, trainer.step, trainer.state)

    micro = recipe.batch // recipe.micro_batch
    span = trainer.step * micro, recipe.steps * micro
    batches = micro_batches(source, recipe.seed, recipe.micro_batch, *span)
    with Stop() as stop, bar:
        train(trainer, batches, write, preview, save, lambda: stop.code)
    if trainer.step == recipe.steps:
        written = "lora.safetensors" if recipe.rank else "weights"
        print(f"{run.path}: finished, {written} written")
        return 0
    print(f"{run.path}: stopped at step {trainer.step}, saved; the same command resumes")
    return stop.code


if __name__ == "__main__":
    cli.run(main)
