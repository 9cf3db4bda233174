"""What may watch a training run beside its own log: TensorBoard, and XLA's profiler."""

from contextlib import contextmanager
from pathlib import Path

import jax

WARM = 2  # steps of a process before those that are traced


@contextmanager
def tell_tensorboard(folder: Path, step: int):
    """While it is entered, scalars of a step that jax.monitoring is told go into TensorBoard's
    files, too; what those hold past `step` is no longer shown."""
    from tensorboardX import SummaryWriter  # not everybody has it: cli.PackageFlag

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def listen(event, value, step=None, **_):
            if step is not None:
                writer.add_scalar(event.removeprefix("/vcloze_jax/"), value, step)

        jax.monitoring.register_scalar_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_scalar_listener(listen)


class Profile:
    """Traces `count` steps into a folder that xprof shows, all steps annotated by their number.

    The first one is sent while the step before it may still run: the trace begins with its end.
    """

    def __init__(self, folder: Path, count: int, begun: int):
        self.folder, self.steps = folder, range(begun + WARM + 1, begun + WARM + 1 + count)
        self.running = False

    @contextmanager
    def annotate(self, step: int):
        """What is inside sends this step."""
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def note_end(self, step: int):
        """That step was waited for."""
        if self.running and step >= self.steps[-1]:
            self.close()

    def close(self):
        """End the trace, however many steps it has."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
