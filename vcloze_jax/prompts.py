"""The sentences of VisualCloze: layout, task and content, and named tasks made of them.

Templates and prefixes are those the model was trained with
(lzyhha/VisualCloze:data/prefix_instruction.py); training draws one of each uniformly.
The wording of a named task follows the tenth template.
"""

from typing import NamedTuple

LAYOUTS = (
    "A grid layout with {R} rows and {C} columns, displaying {N} images arranged side by side.",
    "{N} images are organized into a grid of {R} rows and {C} columns, evenly spaced.",
    "A {R}x{C} grid containing {N} images, aligned in a clean and structured layout.",
    "{N} images are placed in a grid format with {R} horizontal rows and {C} vertical columns.",
    "A visual grid composed of {R} rows and {C} columns, "
    "showcasing {N} images in a balanced arrangement.",
    "{N} images form a structured grid, with {R} rows and {C} columns, neatly aligned.",
    "A {R}x{C} grid layout featuring {N} images, arranged side by side in a precise pattern.",
    "{N} images are displayed in a grid of {R} rows and {C} columns, "
    "creating a uniform visual structure.",
    "A grid with {R} rows and {C} columns, containing {N} images arranged in a symmetrical layout.",
    "{N} images are organized into a {R}x{C} grid, forming a cohesive and orderly display.",
)

TASK_SENTENCES = (
    "Each row outlines a logical process, starting from {c}, to achieve {t}.",
    "In each row, a method is described to use {c} for generating {t}.",
    "Each row presents a task that leverages {c} to produce {t}.",
    "Every row demonstrates how to transform {c} into {t} through a logical approach.",
    "Each row details a strategy to derive {t} based on the provided {c}.",
    "In each row, a technique is explained to convert {c} into {t}.",
    "Each row illustrates a pathway from {c} to {t} using a clear logical task.",
    "Every row provides a step-by-step guide to evolve {c} into {t}.",
    "Each row describes a process that begins with {c} and results in {t}.",
    "In each row, a logical task is demonstrated to achieve {t} based on {c}.",
)

CONTENT_PREFIXES = (
    "The content of the last image in the final row is: ",
    "The last image of the last row depicts: ",
    "In the final row, the last image shows: ",
    "The last image in the bottom row illustrates: ",
    "The content of the bottom-right image is: ",
    "The final image in the last row portrays: ",
    "The last image of the final row displays: ",
    "In the last row, the final image captures: ",
    "The bottom-right corner image presents: ",
    "The content of the last image in the concluding row is: ",
)
# Of editing tasks; after the ten, because one of those begins with the first of these.
EDITING_PREFIXES = (
    "In the last row, ",
    "The editing instruction in the last row is: ",
    "The photo doodle effect in the last row is: ",
)


def layout_prompt(rows: int, columns: int, template: int = 0) -> str:
    """Say how many pictures there are and how they are arranged."""
    return LAYOUTS[template].format(R=rows, C=columns, N=rows * columns)


def task_prompt(phrases: list[str], template: int = 9, targets: int = 1) -> str:
    """Say what a row does; one phrase per column, those of the targets last."""
    named = [f"[IMAGE{i}] {phrase}" for i, phrase in enumerate(phrases, start=1)]
    conditions, painted = ", ".join(named[:-targets]), ", ".join(named[-targets:])
    return TASK_SENTENCES[template].format(c=conditions, t=painted)


def content_sentence(content: str) -> str:
    """Say that `content` is what the last picture shows, unless it says so itself; "" stays ""."""
    if not content.strip():
        return ""
    known = content.startswith(CONTENT_PREFIXES + EDITING_PREFIXES)
    return content if known else CONTENT_PREFIXES[1] + content


def strip_prefix(content: str) -> str:
    """The bare content, for the second pass, which knows no grid."""
    for prefix in CONTENT_PREFIXES + EDITING_PREFIXES:
        if content.startswith(prefix):
            return content.removeprefix(prefix)
    return content


def join(*parts: str) -> str:
    """One prompt of the parts that are not empty, one space between."""
    return " ".join(part for part in parts if part)


class Task(NamedTuple):
    """A task sentence and the number of columns that it speaks of."""

    prompt: str
    columns: int


# One phrase per kind of picture. The authors draw one of about ten; these are theirs or like them.
PHRASES = {
    "image": "a high-quality image",
    "photo": "an aesthetically pleasing photograph",
    "reference": "a reference image",
    "canny": "white edge lines on black from canny detection",
    "depth": "depth map showing gray-scale object contours",
    "hed": "soft edge map with continuous outlines from hed detection",
    "normal": "rgb normal map showing the orientation of surfaces",
    "mlsd": "straight line segments detected by mlsd",
    "pose": "human pose with colored lines for bones and joints",
    "mask": "a segmentation mask with each object in a color of its own",
    "sam2": "colorful object masks from sam 2 segmentation",
    "uniformer": "objects as solid color regions by uniformer",
    "foreground": "the foreground on a solid color background",
    "background": "the background with the foreground masked out",
    "style": "Photo with a strong artistic theme",
    "styled": "High-quality visual with distinct artistic touch",
    "relit": "the same image under another illumination",
    "edited": "the same image after an edit",
    "doodled": "the same image decorated with hand-drawn doodles",
    "person": "a photo of a person",
    "garment": "a picture of a garment",
    "dressed": "the same person wearing that garment",
    "left-face": "the left side of a face",
    "right-face": "the right side of the face",
    "frontal": "the same face seen from the front",
}
# What restores a picture -> what is wrong with it.
RESTORATIONS = {
    "deblurring": "a softly blurred image",
    "refocusing": "an image out of focus",
    "super-resolution": "an image of low resolution",
    "depixelation": "an image of large square pixels",
    "softening": "an oversharpened image with halos along its edges",
    "denoising": "an image covered with random noise",
    "despeckling": "an image with black and white specks",
    "demosaicing": "a raw mosaic of a camera's color filter",
    "contrast-reduction": "an image with too much contrast",
    "contrast-enhancement": "a pale image with too little contrast",
    "dequantization": "an image of few levels of color",
    "artifact-removal": "a compressed image with visible blocky artifacts",
    "darkening": "an overexposed, too bright image",
    "brightening": "an underexposed, too dark image",
    "low-light-enhancement": "a dark image taken in low light",
    "desaturation": "an image with oversaturated colors",
    "saturation": "an image with faded colors",
    "colorization": "a gray-scale image without any color",
    "color-correction": "an image with distorted colors",
    "inpainting": "an image with missing parts covered by brush strokes",
    "rotation": "an image turned upside down",
    "barrel-correction": "an image bent outwards by barrel distortion",
    "pincushion-correction": "an image bent inwards by pincushion distortion",
    "unwarping": "an elastically warped image",
    "deraining": "an image with streaks of rain",
    "defrosting": "an image covered with frost",
}
CONDITIONS = (
    *("canny", "depth", "hed", "normal", "mlsd", "pose", "mask", "sam2", "uniformer"),
    *("foreground", "background"),
)
LINES = CONDITIONS[:9]  # those that show a whole picture

# Named after the authors' demos (lzyhha/VisualCloze:examples/gradio_tasks*.py): what is given,
# then what is painted, both in the order of the columns.
COLUMNS = {f"{kind}-to-image": (kind, "image") for kind in CONDITIONS}
COLUMNS |= {f"image-to-{kind}": ("photo", kind) for kind in LINES}
COLUMNS |= {
    "pose-and-canny-to-image": ("pose canny", "image"),
    "image-to-depth-normal-and-hed": ("photo", "depth normal hed"),
    "depth-to-image-and-relighting": ("depth", "image relit"),
    "subject-to-image": ("reference", "image"),
    "subject-extraction": ("photo", "reference"),
    "style-transfer": ("photo style", "styled"),
    "style-transfer-with-subject": ("reference style", "styled"),
    "relighting": ("photo", "relit"),
    "editing": ("photo", "edited"),
    "editing-with-subject": ("reference photo", "edited"),
    "photodoodle": ("photo", "doodled"),
    "try-on": ("person garment", "dressed"),
    "frontal-face": ("left-face right-face", "frontal"),
}
COLUMNS |= {f"subject-and-{kind}-to-image": (f"reference {kind}", "image") for kind in LINES}
COLUMNS |= {f"style-and-{kind}-to-image": (f"{kind} style", "styled") for kind in LINES}
COLUMNS |= {
    f"subject-style-and-{kind}-to-image": (f"reference {kind} style", "styled") for kind in LINES
}
COLUMNS |= {name: (name, "image") for name in RESTORATIONS}
COLUMNS |= {f"{name}-with-subject": (f"reference {name}", "image") for name in RESTORATIONS}


def _task(given: str, painted: str) -> Task:
    kinds = [(PHRASES | RESTORATIONS)[kind] for kind in f"{given} {painted}".split()]
    return Task(task_prompt(kinds, targets=len(painted.split())), len(kinds))


TASKS = {name: _task(*columns) for name, columns in COLUMNS.items()}
