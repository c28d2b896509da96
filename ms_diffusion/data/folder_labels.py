"""What a folder of pictures says of them: classes by folder, and labels and captions in metadata files or text files."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from ..files import read_bytes, shown
from ..runtime import UserError

METADATA = ("metadata.jsonl", "metadata.csv")  # of the imagefolder convention of Hugging Face's datasets
METADATA_BYTES, CAPTION_BYTES = 1 << 28, 1 << 16
MOST_CLASSES = 100_000


class Row(NamedTuple):
    """What a metadata file says of a picture."""

    where: str  # the file and the line, for messages
    captions: tuple[str, ...] | None
    label: str | int | None


def natural_order(name: str) -> tuple[list[Any], str]:
    """A key that sorts "2" before "10"."""
    parts: list[Any] = re.split(r"([0-9]+)", name)
    parts[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0")) for digits in parts[1::2]]  # int() has a limit
    return parts, name


def note(text: str, names: Sequence[Any] = ()) -> None:
    """A line on stderr; of many names it shows the first."""
    such = f", such as {shown(names[0])}" if len(names) > 1 else f": {shown(names[0])}" if names else ""
    print(f"note: {text}{such}", file=sys.stderr)


# Captions


def caption_lines(text: str) -> tuple[str, ...]:
    """The captions in a text, one a line."""
    return tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())


def read_text(path: Path, most: int) -> str:
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{shown(path)} is not UTF-8, at byte {e.start}: save it as UTF-8") from e
    except OSError as e:
        raise UserError(f"{shown(path)} cannot be read: {e.strerror or e}") from e


def text_files(directory: Path, names: Iterable[PurePath], files: set[PurePath]) -> dict[PurePath, tuple[str, ...]]:
    """Picture -> the captions in the .txt file beside it, of those that have one."""
    beside = {name: name.with_suffix(".txt") for name in names}
    return {
        name: caption_lines(read_text(directory / text, CAPTION_BYTES)) for name, text in beside.items() if text in files
    }


# Metadata files


def read_metadata(directory: Path, files: set[PurePath]) -> dict[PurePath, Row]:
    """Picture -> row, of all metadata files below a folder; each names pictures by their paths from its own folder. Raises
    UserError if a file cannot be understood, or a picture is named twice."""
    found: dict[PurePath, Row] = {}
    sources = sorted(file for file in files if file.name in METADATA)
    for name in sources:
        for where, record in read_records(directory / name):
            file_name = record.get("file_name")
            if not (isinstance(file_name, str) and file_name):
                raise UserError(f"{where} has no file_name: each line needs the path of its picture")
            names = (file_name, file_name.replace("\\", "/"))  # the second on Windows
            paths = [PurePath(os.path.normpath(name.parent / each)) for each in names]
            path = paths[0] if paths[0] in files else paths[1]
            if path in found:
                both = f"{found[path].where} and {where}"
                raise UserError(
                    f'{both} both name {shown(file_name)}: keep one line, with several captions as a list in "text"'
                )
            found[path] = Row(where, captions_of(record, where), label_of(record, where))
    if sources and not found:
        raise UserError(
            f"{shown(directory / sources[0])} has no line of a picture; the first line of a .csv names the fields"
        )
    if found and all(row.captions is None and row.label is None for row in found.values()):
        fields = ", ".join(map(str, record))
        raise UserError(f'{where} has the fields {fields}: name that of the captions "text", that of the classes "label"')
    return found


def read_records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(file and line, record) of the lines of a metadata file."""
    text = read_text(path, METADATA_BYTES)
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in rows:
                yield f"{shown(path)}, line {rows.line_num}", {str(key): value for key, value in row.items()}
        except csv.Error as e:
            raise UserError(f"{shown(path)}, after line {rows.line_num}, is no CSV: {e}") from e
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{shown(path)}, line {number}"
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{where}, is no JSON: {e}") from e
            if not isinstance(record, dict):
                raise UserError(f'{where}, is no object such as {{"file_name": "1.png", "text": "a red kite"}}')
            yield where, record


def captions_of(record: dict[str, Any], where: str) -> tuple[str, ...] | None:
    if "text" not in record:
        return None
    texts = record["text"] if isinstance(record["text"], list) else [record["text"] or ""]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "text" is {shown(record["text"])}: write a caption, or a list of captions')
    return tuple(line for text in texts for line in caption_lines(text))


def label_of(record: dict[str, Any], where: str) -> str | int | None:
    label = record.get("label")
    if label is None or label == "":
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or (isinstance(label, int) and label < 0):
        raise UserError(f'{where}: "label" is {shown(label)}: write the name of a class, or its number from 0')
    return label


# Classes


def classes_of_rows(rows: dict[PurePath, Row]) -> tuple[dict[PurePath, int], tuple[str, ...]]:
    """Picture -> class, and the names of the classes: numbers keep themselves, names are in natural order."""
    if missing := next((row for row in rows.values() if row.label is None), None):
        raise UserError(f"{missing.where} has no label, which other lines have: give each picture one")
    labels = {path: str(row.label) for path, row in rows.items()}
    if all(re.fullmatch(r"0|[1-9][0-9]{0,5}", label) for label in labels.values()):
        numbers = {path: int(label) for path, label in labels.items()}
        if (most := max(numbers.values())) < MOST_CLASSES:
            return numbers, tuple(map(str, range(most + 1)))
    names = sorted(set(labels.values()), key=natural_order)
    number_of = {name: number for number, name in enumerate(names)}
    return {path: number_of[label] for path, label in labels.items()}, tuple(names)


def classes_of_folders(
    names: Sequence[PurePath], folders: Iterable[str], directory: Path, captioned: bool
) -> tuple[dict[PurePath, int], tuple[str, ...] | None]:
    """Picture -> class, and the names of the classes: the first-level folders in natural order, also those without a
    picture. Without such folders there are no classes, and each picture has 0. Raises UserError if pictures lie beside the
    folders, unless they have captions, which then say what the classes would."""
    above = [name for name in names if len(name.parts) == 1]
    if len(above) == len(names) or (above and captioned):
        return dict.fromkeys(names, 0), None
    classes = sorted(folders, key=natural_order)
    if above:
        beside = f"{len(above)} pictures, such as {shown(above[0])}, lie" if len(above) > 1 else f"{shown(above[0])} lies"
        listed = ", ".join(map(shown, classes[:5])) + (", ..." if len(classes) > 5 else "")
        todo = "move each picture into the folder of its class"
        raise UserError(f"--data.dir {directory}: {beside} beside the class folders {listed}: {todo}")
    if "train" in classes and set(classes) <= {"train", "test", "val", "valid", "validation", "dev"}:
        raise UserError(
            f"--data.dir {directory} holds the splits {', '.join(classes)}, not classes: "
            f"pass --data.dir {directory / 'train'}, and --data.validation 0.1 to hold some of it back"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    for name in classes:
        if not any(each.parts[0] == name for each in names):
            note(f"the folder {shown(name)} holds no picture; it keeps its number, {number_of[name]}")
    return {name: number_of[name.parts[0]] for name in names}, tuple(classes)
