"""Train VisualCloze: an adapter (or, with --rank 0, the MMDiT) on grids, by masked flow matching.

    python train.py --data examples/pairs                    # mini, on a few pairs: bring your own
    python train.py --mesh 8                                 # on a task it never saw, on a mesh
    python train.py --preset flux-fill --weights FLUX.1-Fill-dev --data mine.jsonl --mesh 8

The run lives in --out, where the same command resumes it; sample.py --lora loads what it learnt.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from vcloze_jax.data.report import show_source
from vcloze_jax.data.sources import draw_groups, open_source
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.recipeflags import parse_training as parse
from vcloze_jax.inputs.recipeflags import read_recipe
from vcloze_jax.inputs.runfolder import RunFolder
from vcloze_jax.storage import places


def main(argv):
    """Check all that the user may have to correct, then load and train; returns the exit code."""
    args = parse(argv, __doc__)
    recipe = read_recipe(args)
    run = RunFolder(args.out or Path("runs", recipe.preset), args.check or not args.plan)
    run.compare(recipe)
    source = open_source(recipe)

    from vcloze_jax import hosts, plan  # JAX from here on
    from vcloze_jax.devices import make_mesh, micro_size, parse_mesh
    from vcloze_jax.storage import models

    mesh = make_mesh(parse_mesh(recipe.mesh) if recipe.mesh else None)
    run.writes = hosts.is_first()
    with hosts.agreed():
        run.compare(recipe)  # again: who of several hosts writes is known now
        folder = Path(cli.fetch_weights(args) or places.shipped_weights(recipe.placement))
        recipe = replace(recipe, micro_batch=micro_size(recipe, mesh))  # of a group
        preset = models.checked_training_preset(folder, recipe, mesh)
        origins = models.describe_origins(folder, preset, source.digest(), mesh)
        run.compare_origins(recipe, origins, args.accept)
    if args.plan:
        print(plan.training(preset, source, mesh, args.device))
    if args.check and run.writes:
        tokenizers = models.check_loading(preset, folder, run.checkpoints)
        print(show_source(source, recipe, run.sheet, tokenizers))
    if args.plan or args.check:
        return 0
    with hosts.agreed():
        run.lock()  # a run that is there; create() locks a new one
    watchers = dict(tensorboard=args.tensorboard, profile=args.profile)
    with closing(run), hosts.one_end():
        return learn(run, origins, preset, folder, mesh, source, **watchers)


def learn(run, origins, preset, folder, mesh, source, **watchers):
    """Load the models, take up the run where it stands, and train to its last step or a signal."""
    from vcloze_jax.hosts import agreed, drawn_here
    from vcloze_jax.optimizers import make_optimizer
    from vcloze_jax.rowmemory import choose_readers
    from vcloze_jax.runwriter import RunWriter
    from vcloze_jax.storage import checkpoint, gridcache, models
    from vcloze_jax.storage.textreader import Tokenizers
    from vcloze_jax.trainer import Trainer, train

    recipe, tokenizers = preset.recipe, Tokenizers(folder, preset.t5, preset.clip)
    cache = gridcache.fill_cache(source, preset, folder, mesh, tokenizers, run.checkpoints)
    parts = models.load_for_training(preset, folder, mesh)
    tx = make_optimizer(recipe.clip, recipe.weight_decay, recipe.optimizer)
    trainer = Trainer(parts, preset, tokenizers, mesh, tx, source.masks_every_row)
    choose_readers(trainer, cache)  # on one CPU and with --cache rows come encoded
    with agreed():
        run.create()  # after all that the user may have to correct
    trainer.step, trainer.state = checkpoint.resume(run.checkpoints, trainer.state)
    if trainer.step == recipe.steps:
        print(f"{run.path}: finished at step {trainer.step}; a larger --steps goes on")
        return 0
    run.settle(recipe, origins)

    first, last = (n * recipe.batch // recipe.group for n in (trainer.step, recipe.steps))
    groups = draw_groups(source, recipe, first, last, drawn_here(recipe, mesh))
    with RunWriter(run, trainer, source, folder, cache, **watchers) as writer:
        writer.prepare()
        train(trainer, writer.until_broken(groups), writer)
    return writer.conclude()


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
