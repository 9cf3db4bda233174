"""Where Graph200K's pictures lie: published Arrow shards, or a JSON file of paths.

Both are read in place, one picture at a time: shards are mapped into memory, and a JSON file is
indexed by the place of each item, so that neither is ever held. What an item lacks is known from
the start. Formats: the dataset card of VisualCloze/Graph200K, and lzyhha/VisualCloze:processing.py.
"""

import hashlib
from pathlib import Path

import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.data.spans import SpanReader, scan_objects
from vcloze_jax.inputs.checks import check_type, describe_error, error_context, parse_json
from vcloze_jax.inputs.pictures import check_file, decode_picture, open_picture

EDITS, STYLES = 5, 3  # pictures of FillEdit; of each style, with as many references
LEAST_CONSISTENCY = 3  # of a reference, by the quality assessment; below it is left out

# Annotation -> its columns in the shards. One is there if all of its columns are.
COLUMNS = {
    name: (name,)
    for name in (
        "target canny depth hed normal mlsd openpose sam2_mask uniformer foreground DepthEdit"
    ).split()
}
COLUMNS |= {
    "reference": ("ref",),
    "mask": ("qwen_2_5_mask",),
    "bbox": ("qwen_2_5_bounding_box",),  # boxes drawn on the target; no list of the authors' has it
    "FillEdit": tuple(f"FillEdit_image_{i}" for i in range(EDITS)),
}
COLUMNS |= {
    style: tuple(f"{style}_{part}_{i}" for part in ("image", "ref") for i in range(STYLES))
    for style in ("InstantStyle", "ReduxStyle")
}
# Columns that are no pictures; the boxes of qwen_2_5_meta are drawn in `bbox` already.
OTHERS = ("quality_assessment", "description", "collection", "FillEdit_meta", "qwen_2_5_meta")


class ArrowItems:
    """A split saved by `save_to_disk` of Hugging Face's datasets: a Table of mapped shards.

    `has` says of each annotation which items have it: bool [N]. `notes` say what is unlike the
    published schema. Raises UserError naming the file, or the column.
    """

    def __init__(self, folder):
        self.folder, (self.table, self.content) = folder, map_shards(folder)
        self.has, self.notes = {}, []
        for name, columns in COLUMNS.items():
            self.has[name] = np.all([self._find(c) for c in columns], axis=0)
        unknown = set(self.table.column_names) - {c for cs in COLUMNS.values() for c in cs}
        self.notes += [f"unknown column {c}, not used" for c in sorted(unknown - {*OTHERS})]
        self.has["reference"] &= self._assess()
        self._check_description()

    def __len__(self):
        return self.table.num_rows

    def name(self, item):
        """What the user finds it by."""
        return f"{self.folder}: item {item}"

    def _find(self, column):
        """Which items have a picture in a column: bool [N]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if column not in self.table.column_names:
            self.notes.append(f"no column {column}")
            return np.zeros(len(self), bool)
        values = self.table[column]
        kind = self.table.schema.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise UserError(f"{self.folder}: column {column} holds {kind}, not encoded pictures")
        there = values.is_valid()
        inside = pc.struct_field(values, "bytes").is_valid()
        outside = pc.sum(pc.xor(there, inside)).as_py()
        if outside:
            raise UserError(
                f"{self.folder}: column {column}: {outside} pictures are only named by paths; "
                "save the dataset with its pictures embedded"
            )
        return inside.to_numpy()

    def _assess(self):
        """Which references resemble their targets: bool [N]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if "quality_assessment" not in self.table.column_names:
            self.notes.append("no column quality_assessment, so no reference is good enough")
            return np.zeros(len(self), bool)
        try:
            levels = pc.struct_field(self.table["quality_assessment"], "objectConsistency")
            return pc.fill_null(pc.greater_equal(levels, LEAST_CONSISTENCY), False).to_numpy()
        except pa.ArrowException as error:
            where = f"{self.folder}: column quality_assessment"
            raise UserError(
                f"{where}: {describe_error(error)}; it has a level objectConsistency"
            ) from None

    def _check_description(self):
        import pyarrow as pa

        column = self.table.schema.get_field_index("description")
        if column >= 0 and not pa.types.is_struct(kind := self.table.schema.types[column]):
            where = f"{self.folder}: column description"
            raise UserError(f"{where} holds {kind}, not fields as item and description_0")

    def picture(self, item, name, number=0):
        """RGB picture `number` of an annotation. Raises UserError naming the column."""
        column = COLUMNS[name][number]
        content = self.table[column][item].as_py()["bytes"]
        return decode_picture(content, column)

    def describe(self, item):
        """What the target shows, in words; "" where nothing is known."""
        if "description" not in self.table.column_names:
            return ""
        return say_description(self.table["description"][item].as_py())


class JSONItems:
    """The authors' list of items with paths of pictures: a JSON array, or an object a line.

    As `ArrowItems`. Paths are absolute, or relative to the file.
    """

    def __init__(self, file):
        self.file, self.notes = check_file(file), []
        self.bytes = SpanReader(self.file)
        content = self.bytes.map()
        self.spans, flags = [], []
        with error_context(file):
            for span, item in scan_objects(content):
                flags.append(self._flag(item, len(flags)))
                self.spans.append(span)
            if not flags:
                raise UserError("no item in it")
        self.has = dict(zip(COLUMNS, np.array(flags, bool).T, strict=True))
        self.content = hashlib.sha256(content).hexdigest()

    def __len__(self):
        return len(self.spans)

    def name(self, item):
        """What the user finds it by."""
        return f"{self.file}: item {item}"

    def _flag(self, item, number):
        """Which annotations an item has."""
        paths = item.get("condition") if isinstance(item, dict) else None
        if not isinstance(paths, dict):
            raise UserError(f"item {number}: no object with a condition; see processing.py")
        flags = {name: paths.get(name) is not None for name in COLUMNS}
        try:
            level = (item.get("quality_assessment") or {}).get("objectConsistency") or 0
            flags["reference"] &= level >= LEAST_CONSISTENCY
        except (AttributeError, TypeError):
            raise UserError(f"item {number}: quality_assessment is not as published") from None
        try:
            say_description(item.get("description"))
        except (AttributeError, TypeError):
            raise UserError(f"item {number}: description is not as published") from None
        return [*flags.values()]

    def _read(self, item):
        with error_context(f"item {item}"):
            return parse_json(self.bytes[self.spans[item]])

    def picture(self, item, name, number=0):
        """RGB picture `number` of an annotation. Raises UserError naming it and the path."""
        found = self._read(item)["condition"][name]
        try:
            if isinstance(found, dict):
                found = [*found["image_path"], *found.get("style_path", ())][number]
            path = self.file.parent / found
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{name} is not as published") from None
        with error_context(name):
            return open_picture(path)

    def describe(self, item):
        """What the target shows, in words; "" where nothing is known."""
        return say_description(self._read(item).get("description"))


def map_shards(folder):
    """The shards of a split as one Table, mapped, and what it is known by: its fingerprint, as its
    writer gave it, and the sizes of its shards. Raises UserError naming the file."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError("--data graph200k: pip install pyarrow, please") from None

    with error_context(folder / "state.json"):
        state = check_type(parse_json(check_file(folder / "state.json").read_bytes()), dict)
        shards = [shard["filename"] for shard in state.get("_data_files", ())]
        if not shards:
            raise UserError("no _data_files; it is not what save_to_disk writes")
    tables, sizes = [], []
    for shard in shards:
        path = check_file(folder / shard)
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
            table = pa.concat_tables(tables)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: {describe_error(error)}; fetch it again") from None
        sizes.append(path.stat().st_size)
    return table, f"{state.get('_fingerprint')} {sizes}"


def say_description(description):
    """The object's name and its first description, as the authors join them."""
    known = description or {}
    return " ".join(known[key] for key in ("item", "description_0") if known.get(key))


def open_items(path: Path) -> ArrowItems | JSONItems | None:
    """What lies at a path: a split's folder, of shards or of a data.json(l), or such a file."""
    if (path / "state.json").is_file():
        return ArrowItems(path)
    for file in (path, path / "data.json", path / "data.jsonl"):
        if file.is_file():
            return JSONItems(file)
    return None
