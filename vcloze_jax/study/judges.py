"""CLIP and DINOv2 as judges of pictures: by files of the user's, which no package carries, through
transformers and torch (`pip install '.[parity]'` brings both).

Pictures are float32 [N, h, w, 3] in [0, 1]; what is said is 100 times a cosine, float [N].
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.study.asker import to_levels

FLAGS = {"clip": "CLIP", "dinov2": "DINOv2"}  # folders in transformers' layout


def check_judge(name, folder):
    """The folder of a judge. Raises UserError naming the flag if it is none, or without torch."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"--{name} {folder}: holds no config.json; it is a folder of {FLAGS[name]}")
    if not find_spec("torch"):
        raise UserError(f"--{name}: pip install torch, please")
    return folder


@cache
def open_judge(folder):
    """Model and processor of a folder; nothing is fetched."""
    from transformers import AutoModel, AutoProcessor

    made = (
        kind.from_pretrained(folder, local_files_only=True) for kind in (AutoModel, AutoProcessor)
    )
    model, processor = made
    return model.eval().requires_grad_(False), processor


def look_with_clip(folder, pictures):
    """CLIP's projected features of pictures."""
    model, processor = open_judge(folder)
    pixels = processor(images=list(to_levels(pictures)), return_tensors="pt")
    return read_features(model.get_image_features(**pixels))


def read_with_clip(folder, texts):
    """CLIP's projected features of texts, cut where it reads no further."""
    model, processor = open_judge(folder)
    how = dict(padding=True, truncation=True, return_tensors="pt")
    return read_features(model.get_text_features(**processor(text=list(texts), **how)))


def look_with_dino(folder, pictures):
    """DINOv2's class token of pictures."""
    model, processor = open_judge(folder)
    return read_features(model(**processor(images=list(to_levels(pictures)), return_tensors="pt")))


def read_features(said):
    """What a model of torch says, as unit vectors in NumPy: newer versions wrap it."""
    features = getattr(said, "pooler_output", said).numpy().astype(np.float64)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def clip_image(pair, folder):
    """CLIP-I: are they pictures of the same?"""
    return cosine(look_with_clip(folder, pair.painted), look_with_clip(folder, pair.truth))


def clip_text(pair, folder):
    """CLIP-T, and the CLIP score: is it a picture of what the text says?"""
    return cosine(look_with_clip(folder, pair.painted), read_with_clip(folder, pair.texts))


def dino_image(pair, folder):
    """DINOv2: are they pictures of the same subject?"""
    return cosine(look_with_dino(folder, pair.painted), look_with_dino(folder, pair.truth))


def cosine(a, b):
    """Of unit vectors [N, D], times 100."""
    return 100 * (a * b).sum(-1)
