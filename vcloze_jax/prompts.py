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
EDITING_PREFIXES = ("In the last row, ", "The editing instruction in the last row is: ")


def layout_prompt(rows: int, columns: int, template: int = 0) -> str:
    """Say how many pictures there are and how they are arranged."""
    return LAYOUTS[template].format(R=rows, C=columns, N=rows * columns)


def task_prompt(phrases: list[str], template: int = 9) -> str:
    """Say what a row does; one phrase per column, the target's last."""
    *conditions, target = (f"[IMAGE{i}] {phrase}" for i, phrase in enumerate(phrases, start=1))
    return TASK_SENTENCES[template].format(c=", ".join(conditions), t=target)


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
    "blurred": "a softly blurred image",
    "noisy": "an image covered with random noise",
    "gray": "a gray-scale image without any color",
    "dark": "a dark image taken in low light",
    "compressed": "a compressed image with visible blocky artifacts",
    "rainy": "an image with streaks of rain",
    "damaged": "an image with missing parts covered by brush strokes",
    "relit": "the same image under another illumination",
    "edited": "the same image after an edit",
    "doodled": "the same image decorated with hand-drawn doodles",
    "person": "a photo of a person",
    "garment": "a picture of a garment",
    "dressed": "the same person wearing that garment",
    "face": "a photo of a face seen from the side",
    "frontal": "the same face seen from the front",
}

# Named after the authors' demos (lzyhha/VisualCloze:examples/); the last column is the target.
COLUMNS = {
    "canny-to-image": "canny image",
    "depth-to-image": "depth image",
    "hed-to-image": "hed image",
    "normal-to-image": "normal image",
    "mlsd-to-image": "mlsd image",
    "pose-to-image": "pose image",
    "mask-to-image": "mask image",
    "sam2-to-image": "sam2 image",
    "uniformer-to-image": "uniformer image",
    "foreground-to-image": "foreground image",
    "background-to-image": "background image",
    "pose-and-canny-to-image": "pose canny image",
    "image-to-canny": "photo canny",
    "image-to-depth": "photo depth",
    "image-to-hed": "photo hed",
    "image-to-normal": "photo normal",
    "image-to-pose": "photo pose",
    "subject-to-image": "reference image",
    "subject-and-canny-to-image": "reference canny image",
    "subject-and-depth-to-image": "reference depth image",
    "subject-and-pose-to-image": "reference pose image",
    "subject-extraction": "photo reference",
    "style-transfer": "photo style styled",
    "style-and-depth-to-image": "depth style styled",
    "deblurring": "blurred image",
    "denoising": "noisy image",
    "colorization": "gray image",
    "low-light-enhancement": "dark image",
    "artifact-removal": "compressed image",
    "deraining": "rainy image",
    "inpainting": "damaged image",
    "relighting": "photo relit",
    "editing": "photo edited",
    "photodoodle": "photo doodled",
    "try-on": "person garment dressed",
    "frontal-face": "face frontal",
}
TASKS = {
    name: Task(task_prompt([PHRASES[kind] for kind in kinds.split()]), len(kinds.split()))
    for name, kinds in COLUMNS.items()
}
