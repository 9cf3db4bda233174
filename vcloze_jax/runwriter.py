"""What a training run tells while it lasts: metrics, previews, curves, adapters and checkpoints."""

import shlex
from contextlib import ExitStack, closing, suppress
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from vcloze_jax import plan
from vcloze_jax.config import UserError
from vcloze_jax.data.sources import draw_of_shape, draw_validation
from vcloze_jax.devices import copy_to_hosts, painting_mesh
from vcloze_jax.grid import Spec
from vcloze_jax.hosts import Poll, agreed
from vcloze_jax.inputs.cli import name_command
from vcloze_jax.inputs.metrics import draw_curves, flatten_record, summarise_step
from vcloze_jax.inputs.pictures import save_png
from vcloze_jax.inputs.prompts import describe_unread
from vcloze_jax.inputs.runfolder import Log
from vcloze_jax.inputs.sheet import compose_columns, stack_sheets
from vcloze_jax.inputs.signals import Stop
from vcloze_jax.inputs.specfiles import write_spec
from vcloze_jax.inputs.terminal import si
from vcloze_jax.inputs.world import describe_unlike_mini
from vcloze_jax.programs import tally
from vcloze_jax.references import choose_painter
from vcloze_jax.step import merge_models, purpose_key
from vcloze_jax.storage import checkpoint
from vcloze_jax.storage.models import ready_export
from vcloze_jax.storage.places import MINIS
from vcloze_jax.storage.textreader import TextMemory, TextReader
from vcloze_jax.validation import Validation
from vcloze_jax.watchers import Profile, tell_tensorboard

VALIDATION = 3  # groups of held-out grids
SILENT, PATIENCE = 1e-3, 200  # share of the velocities, and steps before that is called silent


class RunWriter:
    """Writes a run into its folder: the `writer` of the training loop. All hosts compute, the first
    writes.

    From `prepare` until it is left, a signal asks for a halt. `folder` is that of the weights,
    `cache` the GridCache of a run without text encoders, or nothing; `tensorboard` says whether to
    write for it, `profile` how many steps to trace.
    """

    def __init__(self, run, trainer, source, folder, cache, *, tensorboard=False, profile=0):
        self.run, self.trainer, self.source, self.folder = run, trainer, source, folder
        self.stop, self.code, self.saving, self.failure = Stop(), 0, None, None
        self.poll, self.any_host = Poll(trainer.mesh), Poll(trainer.mesh)
        if run.writes:
            self.log = Log(run.metrics, trainer.step)
            self.held_out = Log(run.validation, trainer.step)
        self.painter = make_painter(trainer, cache)
        preset, self.bases = trainer.preset, None
        asked = preset.num_inference_steps, preset.guidance_scale
        held_out = source.held_out()
        self.shown = f"{'trained' if held_out is source else 'held-out'} grids"
        examples = enumerate(held_out.previews())
        self.specs = [Spec(e.grid, e.prompt, *asked, seed) for seed, e in examples]
        total = trainer.recipe.steps
        how = dict(unit="step", dynamic_ncols=True, disable=not run.writes)
        self.bar = tqdm(total=total, initial=trainer.step, **how)
        self.profile = Profile(run.path / "profile", profile * run.writes, trainer.step)
        self.annotate, self.ending = self.profile.annotate, ExitStack()
        self.ending.enter_context(closing(self.bar))
        self.ending.enter_context(closing(self.profile))
        if tensorboard and run.writes:
            self.ending.enter_context(tell_tensorboard(run.path / "tensorboard", trainer.step))
        self.first, self.programs = None, 0  # step of this process, and programs at its end

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self.ending:
            if kind is FloatingPointError and self.trainer.step:
                self.save()
            if kind in (None, FloatingPointError) or jax.process_count() == 1:
                self.finish_saving()  # else another host may be lost

    def stopped(self):
        """Whether a host was asked for a halt, or cannot read or save: all answer alike."""
        failed = self.saving and self.saving.done() and self.saving.exception()
        failed = failed or self.failure
        self.code = self.poll(self.stop.code or (2 if failed else 0))
        return bool(self.code)

    def until_broken(self, groups):
        """Groups until there is one that cannot be read. As a signal does that asks for a halt, so
        that what was learnt before is saved; then `conclude` raises it. Of several hosts it ends
        one at once: the others have read on."""
        group = None
        try:
            for group in groups:
                yield group
        except UserError as error:
            if group is None or jax.process_count() > 1:
                raise
            self.failure = error
            yield group  # whose grids nobody asks for any more

    def prepare(self):
        """Compile what the run needs, and show it as it begins. There is nothing to save until
        then: a signal ends the process."""
        examples = [draw_of_shape(self.source, shape) for shape in self.source.shapes()]
        bar = tqdm(examples, "compiling", unit="shape", leave=False, disable=not self.run.writes)
        largest = compile_steps(self.trainer, bar)
        self.measure([example.grid.tokens for example in examples], 1)  # FLOPs are counted now
        group = self.trainer.recipe.group
        groups = draw_validation(self.source.held_out(), group, VALIDATION)
        self.validate = Validation(self.trainer, groups)
        if self.trainer.step == 0:
            self.preview()
        else:
            self.rehearse()
        if self.folder.resolve() in MINIS:
            for sentence in filter(None, dict.fromkeys(map(describe_unlike_mini, self.specs))):
                print(f"warning: {sentence}")
        *_, unread = self.trainer.tokenizers([spec.prompt for spec in self.specs])
        for sentence in dict.fromkeys(said for left in unread for said in describe_unread(left)):
            print(f"warning: of a preview {sentence}")
        print(
            f"{tally['programs']} programs in {tally['seconds']:.0f} s; a micro-batch takes "
            f"{si(largest, 'B')} beside weights and state"
        )
        self.ending.enter_context(self.stop)

    def write(self, sent, seconds):
        """The metrics of a step, into the log, the bar, and to whoever listens to JAX."""
        if self.first is None:
            self.first, self.programs = sent.step, tally["programs"]
        if not self.run.writes:
            return
        speed = self.measure([tokens for _, tokens in sent.shapes], seconds)
        record = summarise_step(sent, seconds, self.trainer.recipe.loss_region, speed)
        self.log.write(record)
        tell_listeners("train", record)
        shown = "loss", "grad_norm", "grids_per_second", "tflops", "mfu"
        shown = {key: f"{record[key]:.3g}" for key in shown if key in record}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.profile.note_end(sent.step)

    def measure(self, tokens, seconds):
        """The speed of a step over grids of so many tokens each."""
        return plan.training_speed(self.trainer.preset.learning, tokens, seconds, self.trainer.mesh)

    def preview(self):
        """Paint what is learnt, beside the base and the truth; measure it on held-out grids."""
        columns, step, recipe = {}, self.trainer.step, self.trainer.recipe
        if recipe.rank:
            self.bases = self.bases or self.paint(base_models(self.trainer))
            columns["base" if recipe.lora else "before"] = self.bases
        does_nothing = step == 0 and recipe.rank and not recipe.lora  # yet: an adapter begins so
        painted = self.bases if does_nothing else self.paint(self.trainer.models())
        columns[f"after {step} steps"] = painted
        if self.stopped():
            return
        loss, effect = self.validate()
        if not self.run.writes:
            return
        sheets = []
        for i, spec in enumerate(self.specs):
            painted = {label: rows[i] for label, rows in columns.items()} | {"truth": None}
            count = len(spec.grid.rows) - 1
            title = f"{count} example" if count == 1 else f"{count} examples"
            sheets.append(compose_columns(title, spec.grid, painted))
        save_png(self.run.previews / f"{step:06d}.png", stack_sheets(sheets))
        record = {"step": step, "loss": loss}
        record |= {"adapter_effect": effect} if recipe.rank else {}
        self.held_out.write(record)
        tell_listeners("validation", record)
        draw_curves(self.run.metrics, self.run.validation, self.run.curves, self.shown)
        if recipe.rank and step >= PATIENCE and effect < SILENT:
            self.bar.write(
                f"warning: after {step} steps the adapter changes velocities by {effect:.1e} of "
                "their size; is --lr too low?"
            )

    def rehearse(self):
        """Compile what previews need, in a run that goes on: by one Euler step, not by painting."""
        trainer = self.trainer
        models = base_models(trainer) if trainer.recipe.rank else trainer.models()
        with suppress(FloatingPointError):  # it is for the step to say
            self.paint(models, steps=1)
        self.validate()

    def paint(self, models, steps=None):
        """The query rows of the previews as these models paint them, as far as the run goes on, and
        no further than so many Euler steps. Nothing on a host that does not write them."""
        if self.painter.mesh != self.trainer.mesh:  # the painter's one device has whole arrays
            models = jax.device_put(models, NamedSharding(self.painter.mesh, PartitionSpec()))
        self.painter.models = models
        go_on = lambda every, _: takewhile(lambda _: not self.stopped(), every[:steps])  # noqa: E731
        canvases = self.painter(self.specs, go_on)
        rows = [canvas.pixels if self.run.writes else None for canvas in canvases]
        self.painter.models = None  # an adapter of zeros, or copies, would stay till the next
        return rows

    def save(self):
        """Begin to save, once the save before is complete: the adapter, then the step, so that a
        run whose last step is there is complete."""
        self.finish_saving()
        trainer, state = self.trainer, copy_to_hosts(self.trainer.state)
        with agreed():
            export = ready_export(self.run, trainer, state, self.folder)
        self.saving = checkpoint.begin(self.run.checkpoints, trainer.step, state, export)

    def finish_saving(self):
        """Wait for the save that was begun. Raises UserError if the disk refuses."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def conclude(self):
        """Say how the run ended -> the exit code."""
        recipe, step = self.trainer.recipe, self.trainer.step
        if self.first:
            count = tally["programs"] - self.programs
            print(f"programs compiled after step {self.first}: {count or 'none'}")
        if step < recipe.steps:
            saved = ", saved" if step else ""
            print(f"{self.run.path}: stopped at step {step}{saved}; the same command resumes")
            if self.failure:
                raise self.failure
            return self.code
        written = "lora.safetensors" if recipe.rank else "weights"
        print(f"{self.run.path}: finished, {written} written")
        sheet = self.run.previews / f"{step:06d}.png"
        if sheet.exists():  # no signal came before it was painted
            print(f"{self.shown}, before and after: {sheet}; losses: {self.run.curves}")
        print(f"paint one of them: {self.pose_question(self.run.path / written)}")
        return 0

    def pose_question(self, written):
        """Write a held-out grid as a spec -> the command that paints it with what was learnt."""
        recipe, file = self.trainer.recipe, self.run.question
        asked = max(self.specs, key=lambda spec: len(spec.grid.rows))
        if self.run.writes:
            write_spec(file, asked, recipe.resolution)
        base = ["--weights", recipe.weights] if recipe.rank and recipe.weights != "mini" else []
        learnt = ["--lora" if recipe.rank else "--weights", str(written)]
        return shlex.join([*name_command("sample"), "--grid", str(file), *base, *learnt])


def compile_steps(trainer, examples):
    """Compile all that steps over grids of these shapes need, so that nothing is compiled later;
    returns the bytes that the largest program takes beside its inputs."""
    key, largest, size = purpose_key(0, "validation"), 0, trainer.micro
    for example in examples:
        noisy = trainer.encode([example] * size, range(size), key)
        args = trainer.state.trainable, trainer.frozen, trainer.grads, noisy
        program = trainer.program("accumulate", noisy.x_t.shape, *args)
        largest = max(largest, program.memory_analysis().temp_size_in_bytes)
    loss = jax.ShapeDtypeStruct((size,), np.float32, sharding=trainer.state.skipped.sharding)
    losses = [loss] * (trainer.recipe.batch // size)
    trainer.program("update", (), trainer.state, trainer.grads, losses, np.float32(0))
    return largest


def tell_listeners(what, record):
    """A record's numbers to whoever listens to JAX: jax.monitoring.register_scalar_listener."""
    for name, value in flatten_record(record).items():
        jax.monitoring.record_scalar(f"/vcloze_jax/{what}/{name}", value, step=record["step"])


def base_models(trainer):
    """The four networks with an adapter that does nothing."""
    nothing = jax.tree.map(jnp.zeros_like, trainer.learnt)
    return merge_models(trainer.graphdefs, nothing, trainer.frozen)


def make_painter(trainer, cache):
    """A Painter of the models that it is given, which reads their prompts with them, or finds them
    in a GridCache."""
    mesh = painting_mesh(trainer.mesh)
    painter = choose_painter(trainer.preset)(trainer.preset, None, None, mesh)
    encoders = lambda: (painter.models.t5, painter.models.clip)  # noqa: E731
    memory = TextMemory() if "t5" in trainer.frozen else cache
    painter.read_texts = TextReader(trainer.tokenizers, encoders, trainer.dtype, memory)
    return painter
