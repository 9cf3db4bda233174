"""Train mini's autoencoder on GraphEmoji: `python scripts/train_vae.py`.

Rows of one to three cells, since rows are what the model encodes; half of the cells show aligned
nodes, which most tasks are made of. Loss: half the root mean square error of each row + 4e-4 KL to
a unit Gaussian, per dimension. A root, since edge maps err ten times as much as pictures and would
have it all; and what is not gray counts three times, since colours are learned last. Ends by
writing vcloze_jax/mini/vae with the `shift` and `scale` that bring latents to mean 0 and deviation
1. The same command again resumes; --go-on starts from the autoencoder that is there.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from vcloze_jax.conditioning import to_model, to_pixels
from vcloze_jax.config import MINI
from vcloze_jax.data.graph import ALIGNED, NODES
from vcloze_jax.data.graphemoji import read_nodes
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.pictures import save_png
from vcloze_jax.inputs.runfolder import Log
from vcloze_jax.model.vae import VAE
from vcloze_jax.storage import checkpoint, places, weights


def batch(pictures, seed, step, cells):
    """Rows of random pictures: uint8 [cells / c, 64, c * 64, 3], with c = 1, 2, 3 in turn."""
    rng = np.random.default_rng((seed, step))
    c = step % 3 + 1
    subject = rng.integers(len(pictures), size=(cells // c, c))
    any_node = rng.integers(len(NODES), size=subject.shape)
    aligned = [NODES.index(node) for node in rng.choice(ALIGNED, subject.size)]
    node = np.where(rng.random(subject.shape) < 0.5, any_node, np.reshape(aligned, subject.shape))
    rows = pictures[subject, node].swapaxes(1, 2)  # b h c w 3
    return rows.reshape(cells // c, rows.shape[1], -1, 3)


def loss_fn(vae, x, key):
    """x [B, h, W, 3] in [-1, 1] -> loss, metrics."""
    mean, std = vae.moments(x)
    error = vae.decode(mean + std * jax.random.normal(key, mean.shape)) - x
    colour = error - error.mean(-1, keepdims=True)
    mse, chroma = (jnp.square(e).mean((1, 2, 3)) for e in (error, colour))  # b
    kl = 0.5 * (jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std)).mean()
    loss = 0.5 * jnp.sqrt(mse + 2 * chroma + 1e-4).mean() + 4e-4 * kl
    return loss, {"mse": mse.mean(), "chroma": chroma.mean(), "kl": kl}


def main(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--cells", type=int, default=12, help="pictures per step, a multiple of 6")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="start from the shipped autoencoder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    _, pictures = read_nodes("train")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0, args.lr, 100, args.steps), b2=0.99),
    )
    key = jax.random.key(args.seed)
    graphdef, _ = nnx.split(jax.eval_shape(lambda: VAE(MINI.vae, rngs=nnx.Rngs(0))))

    @jax.jit
    def born(key):
        return VAE(MINI.vae, rngs=nnx.Rngs(params=key))

    def init(key):
        vae = weights.load(VAE, MINI.vae, places.MINI_FOLDER) if args.go_on else born(key)
        params = nnx.to_pure_dict(nnx.state(vae))
        return params, tx.init(params)

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, key):
        def of(params):
            return loss_fn(nnx.merge(graphdef, params), to_model(x), key)

        grads, metrics = jax.grad(of, has_aux=True)(state[0])
        updates, opt = tx.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), opt), metrics

    state, start, folder = init(key), 0, args.out / "checkpoints"
    if checkpoint.latest(folder) is not None:
        start, state = checkpoint.restore(folder, state)
    log = Log(args.out / "metrics.jsonl", start)
    for i in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps)):
        begin = time.perf_counter()
        x = batch(pictures, args.seed, i, args.cells)
        state, metrics = step(state, x, jax.random.fold_in(key, i))
        metrics = {name: float(value) for name, value in metrics.items()}
        log.write({"step": i + 1, **metrics, "seconds": round(time.perf_counter() - begin, 4)})
        bar.set_postfix(metrics, refresh=False)
        if (i + 1) % 250 == 0 or i + 1 == args.steps:
            checkpoint.save(folder, i + 1, state)
            sheet(nnx.merge(graphdef, state[0]), pictures, args.out / f"{i + 1:06d}.png")
    write(nnx.merge(graphdef, state[0]), pictures)


@jax.jit
def reconstruct(vae, x):
    return vae.decode(vae.moments(to_model(x))[0])


def sheet(vae, pictures, path):
    """Three subjects in all nodes, each above its reconstruction."""
    rows = []
    for subject in pictures[:: len(pictures) // 3][:3]:
        for row in (subject, to_pixels(reconstruct(vae, subject))):
            rows.append(np.concatenate(row, 1))
    save_png(path, np.concatenate(rows))


def write(vae, pictures):
    """Measure the latents of single pictures and write the model into mini."""
    some = pictures[::16].reshape(-1, *pictures.shape[2:])
    moments = jax.jit(lambda x: vae.moments(to_model(x))[0])
    latents = np.concatenate([moments(part) for part in np.array_split(some, 32)])
    config = replace(MINI.vae, shift=float(latents.mean()), scale=float(1 / latents.std()))
    weights.save_pipeline(places.MINI_FOLDER, replace(MINI, vae=config), {"vae": vae})


if __name__ == "__main__":
    cli.run(main)
