"""train.py on the cores of one CPU, whose gradients PyTorch's compiler makes (twin.py).

    pip install torch==2.13.0
    python scripts/train_twin.py --data graphemoji --weights DIR --rank 0 ...

All flags are train.py's but two, and all but the gradient is its own: draws, latents, optimizer,
average, checkpoints. Processes share the micro-batches of a step, each on one core.

--guide W (1 where it is left out: not at all) teaches guidance by examples, in grids whose rows are
of one size. With u what the start weights say of the last row without examples, and v with them,
the target there is velocity + (W - 1) log(guidance) / log(30) (v - u): at a guidance of 1 the
data's.

--temperature T (1: not at all) teaches to paint with less chance in it: what is asked is no picture
of the data but what the start weights paint, in two steps, of the same noise times T, at a guidance
of 30; at 1 of the noise itself, and of T's power log(guidance) / log(30) between. Edges are left as
the start weights have them: where many lines may be, their mean is none.

A run remembers neither: who goes on says it again.
"""

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.signals import follow_parent
from vcloze_jax.study.trainings import count_cores
from vcloze_jax.train import main as train

CORES = count_cores()
TIMES = 1, 0.615, 0  # of a teacher's steps: flow.schedule's, of the grids that mini reads


def main(argv):
    import vcloze_jax.trainer  # JAX from here on, once cli.run has told it its cache

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--guide", "--temperature"):
        parser.add_argument(flag, type=float, default=1.0)
    own, argv = parser.parse_known_args(argv)
    if {"-h", "--help"} & {*argv}:
        print(__doc__)  # train.py then tells its own
    sys.argv[0] = str(Path(__file__).parents[1] / "train.py")  # other commands lie beside that
    with ExitStack() as ending:
        vcloze_jax.trainer.Trainer = make_trainer(vcloze_jax.trainer.Trainer, ending, **vars(own))
        return train(argv)


def make_trainer(base, ending, guide=1.0, temperature=1.0):
    """Trainer, but for the gradient; `ending` ends the processes."""

    class TwinTrainer(base):
        def __init__(self, parts, preset, *args, **options):
            super().__init__(parts, preset, *args, **options)
            recipe = preset.recipe
            others = "from_scratch", "placement", "loss_region", "mesh"
            if recipe.rank or any(getattr(recipe, x) != getattr(Recipe, x) for x in others):
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
                raise UserError(f"train_twin.py: give --rank 0, and none of {flags}")
            if (guide, temperature) != (1, 1) and not preset.flux.guidance_embed:
                raise UserError(
                    "--guide, --temperature: a model without guidance has nothing to tell them by"
                )
            if 1 not in (guide, temperature):
                raise UserError(
                    "--guide, --temperature: one run teaches one of them; leave one out"
                )
            self.twin = Twin(self.state.trainable["flux"], preset.flux, ending, guide, temperature)

        def program(self, name, shape, *args):
            if name == "accumulate":
                if (name, shape) not in self.programs:
                    self.programs[name, shape] = self.twin
                    self.twin.compile(*args)
                return self.twin
            program = super().program(name, shape, *args)
            return self.twin.gathers(program) if name == "update" else program

    return TwinTrainer


class Twin:
    """In place of a Trainer's `accumulate`: micro-batches go to processes, each of which adds their
    gradients up; `gathers` has its sum handed to the update. Where a teacher says the target, it is
    the weights that this begins with, which are a run's first also where the run goes on."""

    def __init__(self, flux, config, ending, guide, temperature):
        import jax
        from twin import rearrange

        leaves, treedef = jax.tree.flatten(jax.eval_shape(rearrange, flux))
        shapes, tree = [x.shape for x in leaves], jax.tree.unflatten(treedef, range(len(leaves)))
        self.rearrange = jax.jit(lambda flux: jax.tree.leaves(rearrange(flux)))
        self.restore = jax.jit(jax.linear_transpose(self.rearrange, flux))
        size = sum(map(math.prod, shapes))
        self.weights, *self.sums = (torch.zeros(size).share_memory_() for _ in range(1 + CORES))
        taught = (guide, temperature) != (1, 1)
        teacher = torch.zeros(size).share_memory_() if taught else None
        if teacher is not None:
            self.write(flux, teacher)
        self.as_arrays = partial(
            as_arrays, rows=config.axes_dim[0], guide=guide, temperature=temperature
        )
        self.shapes, self.seen, self.version, self.sent = shapes, None, 0, []
        spawn = torch.multiprocessing.get_context("spawn")
        self.pools = []  # of one process each: which has which micro-batch is the same every time
        for own in self.sums:
            args = self.weights, own, teacher, shapes, tree, config.heads
            self.pools.append(ending.enter_context(ProcessPoolExecutor(1, spawn, begin, args)))

    def __call__(self, trainable, frozen, grads, noisy):
        if trainable is not self.seen:  # an update was made, and nobody is at work
            self.seen, self.version = trainable, self.version + 1
            self.write(trainable["flux"], self.weights)
        told = {"time": noisy.t, "kind": noisy.kinds}
        pool = self.pools[len(self.sent) % CORES]
        self.sent.append(pool.submit(work, self.version, self.as_arrays(noisy)))
        return Told(told, self.sent[-1]), grads

    def write(self, flux, flat):
        np.concatenate([np.ravel(x) for x in self.rearrange(flux)], out=flat.numpy())

    def compile(self, *args):
        """By one process after the other, which finds what the first has made."""
        for _ in range(CORES):
            self(*args)[0]["target"]
        self.gather()

    def gather(self):
        """The gradient of all that was sent since the last time: {"flux": tree}."""
        for future in self.sent:
            future.result()
        total = [x.numpy() for x in views(sum(self.sums), self.shapes)]
        for x in self.sums:
            x.zero_()
        self.sent = []
        return {"flux": self.restore(total)[0]}

    def gathers(self, update):
        return lambda state, grads, *told: update(state, self.gather(), *told)

    def memory_analysis(self):
        """What compiled programs have: here all that the processes have taken."""
        taken = sum(pool.submit(peak_memory).result() for pool in self.pools)
        return type("Memory", (), {"temp_size_in_bytes": taken})


class Told(dict):
    """What a micro-batch tells: its losses once they are there."""

    def __init__(self, told, losses):
        super().__init__(target=None, grid=None, **told)
        self.losses = losses

    def __getitem__(self, name):
        return super().__getitem__(name) if name in ("time", "kind") else self.losses.result()[name]


def as_arrays(noisy, rows=0, guide=1.0, temperature=1.0):
    """A NoisyBatch as twin.losses takes it, in NumPy, with what a teacher is told: `rows` says how
    many channels of a head turn with the row's number, by which the last row is known."""
    from vcloze_jax.model.ops import timestep_embedding

    c = noisy.context
    own = dict(x_t=noisy.x_t, velocity=noisy.velocity, share=noisy.share, time=noisy.t)
    own |= dict(condition=c.condition, txt=c.txt, pooled=c.pooled)
    own |= dict(t=timestep_embedding(noisy.t), guidance=timestep_embedding(c.guidance))
    pe = [np.repeat(np.asarray(x), 2, -1) for x in c.pe]
    of_guidance = np.log(c.guidance) / np.float32(math.log(30))
    if guide != 1:
        own["strength"] = (guide - 1) * of_guidance
        of_row = pe[0][0, c.txt.shape[1] :, 0, :rows]
        own["query"] = np.array((of_row == of_row[-1]).all(-1).sum())
    if temperature != 1:
        # Of a grid whose last column has edges, whichever of its cells is asked for.
        kept = np.array([bytes(kind).rstrip() == b"edges" for kind in np.asarray(noisy.kinds)])
        own["temperature"] = np.where(kept, 1, temperature**of_guidance)
        times = np.broadcast_to(np.float32(TIMES)[:, None], (len(TIMES), len(kept)))
        own["times"] = np.where(kept, np.minimum(times, noisy.t), times)
        own["of_times"] = np.stack([timestep_embedding(x) for x in own["times"][:-1]])
    return {name: np.asarray(x) for name, x in own.items()} | {"pe": pe}


HELD = {}  # by a process, from one micro-batch to the next


def begin(weights, sums, teacher, shapes, tree, heads):
    """What a process does first."""
    follow_parent()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # programs of a function, one a shape
    # As one loop over all that is joined its parts would be masked, element by element.
    torch._inductor.config.max_complex_pointwise_cat_inputs = 0
    torch._inductor.config.max_pointwise_cat_inputs = 0
    weights, sums = (views(flat, shapes) for flat in (weights, sums))
    teacher = None if teacher is None else filled(tree, lowered(views(teacher, shapes)))
    HELD.update(weights=weights, sums=sums, teacher=teacher, tree=tree, heads=heads)


def work(version, noisy):
    """Losses of a micro-batch, {name: [B]}; the gradient of their mean goes to the sums."""
    from twin import losses

    if HELD.get("version") != version:
        leaves = [x.requires_grad_() for x in lowered(HELD["weights"])]
        HELD.update(version=version, leaves=leaves)
    noisy = {
        name: [*map(torch.from_numpy, x)] if name == "pe" else torch.from_numpy(x)
        for name, x in noisy.items()
    }
    p = filled(HELD["tree"], HELD["leaves"])
    target, grid = losses(p, noisy, HELD["heads"], HELD["teacher"])
    grads = torch.autograd.grad(target.mean(), HELD["leaves"])
    torch._foreach_add_(HELD["sums"], [g.float() for g in grads])
    return {"target": target.detach().numpy(), "grid": grid.detach().numpy()}


def lowered(leaves):
    """Copies, of what is multiplied in bfloat16."""
    from twin import LOW, is_product

    return [x.to(LOW) if is_product(x.shape) else x.clone() for x in leaves]


def views(flat, shapes):
    """Arrays of these shapes in one that is flat."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [x.view(shape) for x, shape in zip(parts, shapes, strict=True)]


def filled(tree, leaves):
    """A tree of numbers -> of the leaves that have these."""
    if isinstance(tree, dict):
        return {name: filled(part, leaves) for name, part in tree.items()}
    return [filled(part, leaves) for part in tree] if isinstance(tree, list) else leaves[tree]


def peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
