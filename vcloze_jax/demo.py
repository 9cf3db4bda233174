"""A page in the browser: drop pictures into a grid, and watch its blank cells being painted.

    python -m vcloze_jax.demo                                  # mini, on any CPU
    python -m vcloze_jax.demo --weights FLUX.1-Fill-dev --lora visualcloze-384-lora.pth

It needs pip install '.[demo]': Gradio, with which the authors' own demo is made. What is painted
lies in --out, with its pictures, its film and its record, which the page and sample.py open again.
"""

import json
import socket
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from vcloze_jax.config import UserError
from vcloze_jax.inputs import cli, prompts
from vcloze_jax.inputs.checks import check_type, describe_error, error_context, parse_json
from vcloze_jax.inputs.pictures import check_writable, decode_picture, open_picture
from vcloze_jax.inputs.sheet import MARK
from vcloze_jax.inputs.specfiles import IMAGES, output_names
from vcloze_jax.inputs.tasks import list_tasks
from vcloze_jax.storage.places import adapter_and_name

MOST = 4  # rows of examples, and columns; the query stands in row MOST
HOW = "Rows show a task; the last row asks. What is empty there, or brushed over, is painted."
NUMBERS = "seed", "num_inference_steps", "guidance_scale", "resolution"
OTHERS = "layout_prompt", "latents", "upsampling", "adapter"  # keys without a field of their own
LOCAL = "127.0.0.1"  # nobody else's: a page reads and writes the files of whoever started it


class Page:
    """The components of a page, and what they do; `blocks` is Gradio's."""

    def __init__(self, studio):
        import gradio as gr

        self.gr, self.studio, self.tasks = gr, studio, list_tasks(studio.preset)
        with gr.Blocks(title="vcloze-jax", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.Markdown(f"## vcloze-jax\n{HOW}")
            self.shape = gr.State((2, 2))  # rows, columns
            with gr.Row():
                with gr.Column(scale=3):
                    self.lay_out_grid()
                    self.lay_out_words()
                with gr.Column(scale=2):
                    self.lay_out_results()
            self.connect()

    def lay_out_grid(self):
        """All cells that a grid may have, those of one example and a query to be seen."""
        gr = self.gr
        self.cells = {}
        self.examples = []
        # What is dropped is read by ours, not by Gradio, which paints black what is clear, and has
        # no line for what is no picture. A subclass would have it write a file beside this one.
        gr.Image.preprocess = lambda _, dropped: dropped and dropped.path
        how = dict(sources=["upload", "clipboard"], format="png")
        for r in range(MOST):
            with gr.Row(visible=r < 1) as row:
                self.examples.append(row)
                for c in range(MOST):
                    name, id = f"example {r + 1}, column {c + 1}", f"cell_{r}_{c}"
                    seen = dict(height=170, visible=c < 2, elem_id=id)
                    self.cells[r, c] = gr.Image(label=name, **seen, **how)
        brush = gr.Brush(colors=[f"rgb{MARK}"], color_mode="fixed", default_size=12)
        how |= dict(type="pil", image_mode="RGBA", brush=brush, transforms=(), layers=False)
        with gr.Row():
            for c in range(MOST):
                name, id = f"query, column {c + 1}", f"cell_{MOST}_{c}"
                self.cells[MOST, c] = gr.ImageEditor(
                    label=name, height=330, visible=c < 2, elem_id=id, **how
                )
        with gr.Row():
            self.steps = {
                gr.Button("+ row", size="sm"): (1, 0),
                gr.Button("− row", size="sm"): (-1, 0),
                gr.Button("+ column", size="sm"): (0, 1),
                gr.Button("− column", size="sm"): (0, -1),
            }

    def lay_out_words(self):
        """What is said beside the pictures: all keys of a spec, the rarer ones in one field."""
        gr, preset = self.gr, self.studio.preset
        with gr.Row():
            self.shows = [
                gr.Textbox(label=f"column {c + 1} shows", visible=c < 2) for c in range(MOST)
            ]
            self.task = gr.Dropdown(["", *self.tasks], label="or a task by its name")
        self.words = {
            "task_prompt": gr.Textbox(label="the task, as it will be said", lines=2),
            "content_prompt": gr.Textbox(label="what the painted picture shows"),
        }
        defaults = 0, preset.num_inference_steps, preset.guidance_scale, preset.resolution, 1
        with gr.Row():
            self.numbers = {
                key: gr.Number(value, label=key, min_width=110)
                for key, value in zip((*NUMBERS, IMAGES), defaults, strict=True)
            }
        self.others = gr.Textbox(label="other keys of a spec, as JSON")
        given = "\n".join(self.studio.adapters)
        self.adapters = gr.Textbox(given, label="adapters: [NAME=]FILE[:SCALE], one a line")
        self.fields = self.words | self.numbers

    def lay_out_results(self):
        """What is painted, as it comes, and what may be kept."""
        gr = self.gr
        self.go = gr.Button("paint", variant="primary")
        self.told = gr.Textbox(label="how it went", elem_id="told", interactive=False)
        how = dict(columns=1, height=620, object_fit="contain", format="png")
        self.shown = gr.Gallery(label="painted", elem_id="shown", **how)
        self.kept = gr.File(label="sheets, pictures, films, records", file_count="multiple")
        self.record = gr.File(
            label="open a record, or a spec whose paths are absolute",
            file_types=[".json"],
            height=120,
            elem_id="record",
        )

    def connect(self):
        """Say which component does what."""
        cells, fields = self.cells.values(), self.fields.values()
        laid = [self.shape, *self.examples, *cells, *self.shows]
        for button, step in self.steps.items():
            change = partial(self.change_shape, by=step)
            button.click(change, self.shape, laid, show_progress="hidden")
        for (r, _), cell in self.cells.items():
            if r < MOST:  # in the others the browser takes no file that it cannot read
                look = partial(self.look_at, cell)
                cell.upload(look, cell, [cell, self.told])
        for box in self.shows:
            box.change(self.say_task, [self.shape, *self.shows], self.words["task_prompt"])
        self.task.change(self.name_task, self.task, self.words["task_prompt"])
        given = {self.shape, self.adapters, self.others, *cells, *fields}
        self.go.click(self.paint, given, [self.told, self.shown, self.kept])
        self.record.upload(self.open, self.record, [*laid, *fields, self.others, self.told])

    def change_shape(self, shape, by):
        """Add or remove a row or a column, within what the page has."""
        rows, columns = (n + step for n, step in zip(shape, by, strict=True))
        return self.show_shape(min(max(rows, 1), MOST + 1), min(max(columns, 1), MOST))

    def show_shape(self, rows, columns):
        """Show the cells of a grid of so many rows, the query's included, and hide the others."""
        update = self.gr.update
        return {
            self.shape: (rows, columns),
            **{row: update(visible=r < rows - 1) for r, row in enumerate(self.examples)},
            **{cell: update(visible=c < columns) for (_, c), cell in self.cells.items()},
            **{box: update(visible=c < columns) for c, box in enumerate(self.shows)},
        }

    def look_at(self, cell, file):
        """Take a file back out of a cell if it is no picture, and say why."""
        try:
            decode_picture(Path(file).read_bytes(), repr(Path(file).name))
        except UserError as error:
            return {cell: None, self.told: f"error: {cell.label}: {error}"}
        return {self.told: ""}

    def say_task(self, shape, *phrases):
        """The task's sentence, once every column has a phrase."""
        phrases = [phrase.strip() for phrase in phrases[: shape[1]]]
        return prompts.task_prompt(phrases) if all(phrases) and len(phrases) > 1 else self.gr.skip()

    def name_task(self, name):
        return self.tasks[name].prompt if name else ""

    def paint(self, values):
        """Paint the grid that the page holds, {component: value}; show it as it comes."""
        rows, columns = values[self.shape]
        grid = [
            [values[self.cells[r, c]] for c in range(columns)] for r in (*range(rows - 1), MOST)
        ]
        table = {key: whole(values[field]) for key, field in self.fields.items()}
        if table[IMAGES] == 1:
            del table[IMAGES]  # or its files would be named after the seed
        adapters = list(filter(None, map(str.strip, values[self.adapters].splitlines())))
        yield {self.told: "painting; at first the model is read and compiled", self.kept: None}
        try:
            table = read_others(values[self.others]) | table
            for painted in self.studio.paint(grid, table, adapters):
                live = [(x, name) for name, x in painted.items() if isinstance(x, str)]
                if live:
                    yield {self.shown: live}
        except (UserError, FloatingPointError, OSError) as error:
            yield {self.told: f"error: {error}"}
            return
        told, kept, shown = ["done"], [], []
        for name, painting in painted.items():
            told += [painting.record["adapters"]] * bool(adapters) + painting.remarks
            names = output_names(name, len(painting.images), film=True)
            files = [str(self.studio.out / file) for file in names]
            kept += files
            sheet, *_, film, _ = zip(files, names, strict=True)
            shown += [sheet, film]
        said = "\n".join(dict.fromkeys(told))
        yield {self.told: said, self.kept: kept, self.shown: shown}

    def open(self, file):
        """Lay out the grid of a record, or of a spec that has its paths in full: of a file that is
        dropped here nobody knows the folder."""
        try:
            examples, query, spec = self.studio.open(file)
        except UserError as error:
            return {self.told: f"error: {error}"}
        if len(examples) > MOST or len(query) > MOST:
            most = f"{MOST} rows of examples and {MOST} columns"
            return {self.told: f"error: {Path(file).name}: more than {most}; use sample.py"}
        update = self.gr.update
        laid = self.show_shape(len(examples) + 1, len(query))
        # As pictures: of files Gradio shows only those in folders that it was told of.
        examples = [[open_picture(file) for file in row] for row in examples]
        for r, row in [*enumerate(examples), (MOST, query)]:
            laid |= {self.cells[r, c]: update(value=x, visible=True) for c, x in enumerate(row)}
        laid |= {field: spec[key] for key, field in self.fields.items() if key in spec}
        laid |= {self.numbers[IMAGES]: 1, self.others: show_others(spec)}
        return laid | {self.told: f"opened {Path(file).name}"}


def show_others(spec):
    """Of a resolved spec what the page has no field of its own for, as JSON; "" for nothing. The
    layout's sentence, which follows the grid, is among it where it is another."""
    rows = spec["image"]
    others = {key: spec[key] for key in OTHERS if spec.get(key)}
    if spec["layout_prompt"] == prompts.layout_prompt(len(rows), len(rows[0])):
        others.pop("layout_prompt", None)
    elif not spec["layout_prompt"]:
        others["layout_prompt"] = ""  # none at all
    return json.dumps(others, ensure_ascii=False) if others else ""


def read_others(text):
    """What `show_others` shows, perhaps edited -> keys of a spec. Raises UserError."""
    with error_context("other keys"):
        return check_type(parse_json(text.encode()), dict) if text.strip() else {}


def check_port(port):
    """Raise UserError for a port of this machine that a page cannot have."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCAL, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {describe_error(error)}; choose another") from None


def whole(value):
    """A number of the page, where all are floats: an integer if it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def main(argv):
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser, adapter_and_name)
    add = parser.add_argument
    add("--offload", action="store_true", help="slower; FLUX paints on 24 GB")
    add("--out", type=cli.path, default=Path("outputs"), metavar="DIR")
    add("--port", type=cli.positive_int, default=7860, help="on this machine alone")
    args = parser.parse_args(argv)
    check_writable(args.out, "page0_seed0_target0.png")
    if find_spec("gradio") is None:
        raise UserError("the page is made with Gradio: pip install 'vcloze-jax[demo]', please")
    out = args.out.absolute()
    check_port(args.port)

    from vcloze_jax.studio import Studio  # JAX from here on

    studio = Studio(cli.fetch_weights(args), args.lora, args.mesh, out, args.offload)
    print(studio.pipeline.summary())
    page = Page(studio).blocks
    print(f"http://{LOCAL}:{args.port}")
    where = dict(server_name=LOCAL, server_port=args.port, allowed_paths=[str(out)])
    page.launch(**where, show_error=True, quiet=True)


if __name__ == "__main__":
    cli.run(main)
