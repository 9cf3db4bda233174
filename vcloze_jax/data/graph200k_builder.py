"""Graph200K as a dataset of tensorflow-datasets, for users of tfds; train.py reads the shards.

`Graph200K(data_dir=…).download_and_prepare(...)` with the published folder as `manual_dir` copies
its encoded pictures, unchanged, into tfds' own files: hundreds of gigabytes once more.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from vcloze_jax.data.graph200k_items import COLUMNS, ArrowItems

PICTURES = tuple(dict.fromkeys(column for columns in COLUMNS.values() for column in columns))
TEXTS = {
    "description": ("item", "description_0", "description_1", "category"),
    "FillEdit_meta": ("name", "description"),
}
LEVELS = ("compositeStructure", "objectConsistency", "imageQuality")  # -1 where there is none


class Graph200K(tfds.core.GeneratorBasedBuilder):
    """One record per item. A picture that may be missing is a sequence of none or one."""

    name = "graph200k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The columns of VisualCloze/Graph200K on Hugging Face."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Fetch the dataset VisualCloze/Graph200K from Hugging Face; its folders are train and test."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        pictures = {c: tfds.features.Sequence(tfds.features.Image()) for c in PICTURES}
        texts = {c: {key: tfds.features.Text() for key in keys} for c, keys in TEXTS.items()}
        others = {
            "collection": tfds.features.Text(),
            "qwen_2_5_meta": tfds.features.Text(),  # as JSON; "" where there is none
            "quality_assessment": {key: np.int32 for key in LEVELS},
            "description_valid": np.bool_,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Subjects with conditions, edits and styles, of which some are missing.",
            homepage="https://huggingface.co/datasets/VisualCloze/Graph200K",
            features=tfds.features.FeaturesDict(pictures | texts | others),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = dl_manager.manual_dir
        splits = [split for split in ("train", "test") if (folder / split).exists()]
        return {split: self._generate_examples(folder / split) for split in splits}

    def _generate_examples(self, folder):
        table = ArrowItems(Path(folder)).table  # tfds has paths of its own
        for i in range(table.num_rows):
            record = table.slice(i, 1).to_pylist()[0]
            found = {column: record.get(column) for column in PICTURES}
            example = {c: [p["bytes"]] if p else [] for c, p in found.items()}
            for column, keys in TEXTS.items():
                said = record.get(column) or {}
                example[column] = {key: said.get(key) or "" for key in keys}
            levels = record.get("quality_assessment") or {}
            known = {key: levels.get(key) for key in LEVELS}
            example["quality_assessment"] = {k: -1 if v is None else v for k, v in known.items()}
            example["collection"] = str(record.get("collection") or "")
            meta = record.get("qwen_2_5_meta")
            example["qwen_2_5_meta"] = "" if meta is None else json.dumps(meta)
            valid = (record.get("description") or {}).get("description_valid")
            yield i, example | {"description_valid": bool(valid)}
