"""What an image is called, which a network is conditioned on: its class, or a caption. One object for each kind of
condition draws its rows for training, makes them for samples, and says what a run keeps: labels.json in its folder."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data.batches import ImageSet
from ...data.captions import CAPTIONS, FASHION_WORDS
from ...data.tokenizers import BytePairs, Tokenizer
from ...fields import find_problem
from ...files import read_json, write_json
from ...randomness import Random, drop_labels
from ...runtime import UserError, command

FILE = "labels.json"
MOST_IN_TURN = 100  # classes or captions that are drawn one after the other; of more, evenly spaced ones
MOST_KEPT = 1000  # captions that a run keeps as prompts

Rows = np.ndarray


class Nothing:
    """No condition on classes or captions."""

    field: str | None = None
    null: Any = None
    count: Any = None  # of classes, or of rows in the table of captions

    def draw(self, rng: Random, ids: np.ndarray, dropout: float) -> Rows:
        """The condition's rows (B, ...) for images of these ids, each replaced by `null` with probability `dropout`."""
        raise NotImplementedError

    def ids(self, image_set: ImageSet) -> np.ndarray:
        """What `draw` takes for the images of a set: (N,) int32. Raises UserError if it is not known of all of them."""
        return image_set.labels

    def check_ids(self, ids: np.ndarray) -> None:
        """Refuse ids that the network does not fit."""

    def rows(self, num: int, labels: Any = None, prompt: str | None = None) -> Rows:
        """The rows (num, ...) for samples of a class or a prompt; by default each class, or caption, in turn. Raises
        UserError if the network is not conditioned on what is given."""
        self.refuse_prompt(prompt)
        if labels is not None:
            train = command("train")
            raise UserError(f"this run has no classes, which --class needs: train one with {train} --preset quick-class")
        return np.zeros((num, 0))

    def null_rows(self, num: int) -> Rows:
        """The rows (num, ...) for samples of no class or caption."""
        return self.rows(num)

    def refuse_prompt(self, prompt: str | None) -> None:
        if prompt is not None:
            train = command("train")
            raise UserError(f"this run was not trained on captions, which --prompt needs: {train} --preset latent-text")

    def label_array(self, labels: Any, num: int) -> Any:
        """The classes (num,) int32 of samples, for their columns and titles; None where there are none."""
        return None

    def titles(self, ids: Any) -> list[str] | None:
        """What is written below samples of these classes."""
        return None

    @property
    def columns(self) -> int | None:
        """Columns of a grid of samples in turn."""
        return self.count if self.count and self.count <= MOST_IN_TURN else None

    def record(self) -> dict[str, Any]:
        """What the run keeps: the content of labels.json."""
        return {}


class Classes(Nothing):
    """The class of an image, 0 to `count` - 1; `null` stands for no class.

    Args:
        names: Of all classes, in the order of their labels."""

    field = "labels"

    def __init__(self, count: int, null: int, names: Sequence[str] | None = None):
        self.count, self.null, self.named = count, null, len(names or ())
        self.names = tuple(names) if names and len(names) == count else None

    def draw(self, rng: Random, ids: np.ndarray, dropout: float) -> Rows:
        return drop_labels(rng, ids, dropout, self.null)

    def ids(self, image_set: ImageSet) -> np.ndarray:
        labels, own = image_set.labels, image_set.class_names
        if not self.names or not own or own == self.names:
            return labels
        number = {name: i for i, name in enumerate(self.names)}
        if new := [own[i] for i in np.unique(labels) if own[i] not in number]:
            known = ", ".join(self.names[:20])
            raise UserError(
                f"the class {new[0]!r} is not one of this run's ({known}): use another --run-dir for new classes"
            )
        return np.array([number.get(name, 0) for name in own], np.int32)[labels]

    def check_ids(self, ids: np.ndarray) -> None:
        if (lowest := ids.min()) < 0:
            raise UserError(f"the data has labels down to {lowest}: number the classes from 0")
        if (highest := ids.max()) >= self.count:
            raise UserError(f"the data has labels up to {highest}: set --model.num-classes {max(highest + 1, self.named)}")

    def rows(self, num: int, labels: Any = None, prompt: str | None = None) -> Rows:
        self.refuse_prompt(prompt)
        return self.label_array(labels, num)

    def null_rows(self, num: int) -> Rows:
        return np.full(num, self.null, np.int32)

    def label_array(self, labels: Any, num: int) -> np.ndarray:
        """Labels (num,) int32 from a class's number or name, or an array of numbers; each class in turn from None."""
        if labels is None:
            return in_turn(num, self.count)
        if isinstance(labels, str):
            name, names = labels.lower(), [each.lower() for each in self.names or ()]
            is_number = name.isdecimal() and int(name) < self.count
            if name in names:  # first: a class may be called by another one's number
                labels = names.index(name)
            elif is_number:
                labels = int(name)
            else:
                shown = ", ".join((self.names or ())[:50])
                choices = f", or one of {shown}" if names else ""
                raise UserError(f"--class {labels}: choose from 0 to {self.count - 1}{choices}")
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.shape not in ((), (num,)):
            raise UserError(f"labels must be one or {num} whole numbers or a class name, these are {labels.shape}")
        highest = self.count if self.null == self.count else self.count - 1
        if (wrong := labels[(labels < 0) | (labels > highest)]).size:
            raise UserError(f"class {wrong.flat[0]}: choose from 0 to {self.count - 1}")
        return np.broadcast_to(labels, num).astype(np.int32)

    def titles(self, ids: np.ndarray) -> list[str] | None:
        return [self.names[i] for i in ids] if self.names else None

    def record(self) -> dict[str, Any]:
        return {"class_names": list(self.names)} if self.names else {}


class Captions(Nothing):
    """A caption of an image, as tokens.

    Args:
        table: Captions; one of those in a row describes an image.
        tokenizer: `encode(texts)` returns tokens (N, max_length) int32.
        names: What each row of the table is called; by default its first caption.
        null: The tokens (max_length,) that stand for no caption; by default tokens of 0 alone."""

    field = "tokens"

    def __init__(self, table: Sequence[Sequence[str]], tokenizer: Any, names: Sequence[str] | None = None, null: Any = 0):
        self.table, self.tokenizer, self.null = tuple(map(tuple, table)), tokenizer, null
        self.count, self.firsts = len(self.table), [row[0] for row in self.table]
        self.names = tuple(names) if names and len(names) == self.count else tuple(self.firsts)
        self.every = list(dict.fromkeys(caption for row in self.table for caption in row))
        place = {caption: i for i, caption in enumerate(self.every)}
        self.places = np.array([place[caption] for row in self.table for caption in row])  # of each caption in `every`
        self.counts = np.array([len(row) for row in self.table])
        self.starts = np.cumsum(self.counts) - self.counts
        self.most = min(math.lcm(*self.counts.tolist()), 2**31)  # a draw below it, modulo a count, is uniform

    def encode(self, texts: Sequence[str]) -> Rows:
        """The rows (N, ...) of texts."""
        return self.tokenizer.encode(texts)

    def encode_table(self, texts: Sequence[str]) -> Rows:
        """The rows of all captions that the table has. All ranks call this."""
        return self.encode(texts)

    @cached_property
    def encoded(self) -> Rows:
        """The rows of `every`."""
        return self.encode_table(self.every)

    def ids(self, image_set: ImageSet) -> np.ndarray:
        if image_set.captions is None or image_set.caption_ids is None:
            raise UserError(NO_CAPTIONS)
        return image_set.caption_ids

    def draw(self, rng: Random, ids: np.ndarray, dropout: float) -> Rows:
        chosen = self.starts[ids] + rng.integers(0, self.most, len(ids)) % self.counts[ids]
        return drop_labels(rng, self.encoded[self.places[chosen]], dropout, self.null)

    def rows(self, num: int, labels: Any = None, prompt: str | None = None) -> Rows:
        if prompt is not None:
            return self.encode([prompt]).repeat(num, 0)
        if isinstance(labels, np.ndarray) and labels.ndim == 2:
            return labels
        chosen, places = np.unique(self.label_array(labels, num), return_inverse=True)
        return self.encode([self.firsts[i] for i in chosen])[places]

    def null_rows(self, num: int) -> Rows:
        return np.full((num, self.tokenizer.max_length), self.null, np.int32)

    def label_array(self, labels: Any, num: int) -> np.ndarray:
        """Rows of the table, (num,) int32: one that is given by number or name, or each in turn."""
        return Classes(self.count, 0, self.names).label_array(labels, num)

    def titles(self, ids: np.ndarray) -> list[str] | None:
        return [self.firsts[i] for i in ids]

    def record(self) -> dict[str, Any]:
        kept = [self.table[i] for i in in_turn(min(self.count, MOST_KEPT), self.count)]
        names = {} if self.count > MOST_KEPT else {"class_names": list(self.names)}
        return {**names, "captions": [list(row) for row in kept], "tokenizer": self.tokenizer.to_record()}


NO_CAPTIONS = "the images have no captions, which a network of texts needs: docs/training.md says how to write them"


def caption_table(image_set: ImageSet | None, kept: dict[str, Any]) -> Sequence[Sequence[str]]:
    """The captions of the images, or those that a run has `kept`. Raises UserError if the images have none."""
    table = image_set.captions if image_set else kept.get("captions", CAPTIONS)
    if not table:
        raise UserError(NO_CAPTIONS)
    return table


def caption_names(table: Any, image_set: ImageSet | None, kept: dict[str, Any], names: Any = None) -> Any:
    """What the rows of a table of captions are called: the names that the run has kept, if it has kept the same captions."""
    is_kept = kept.get("captions", table) == table
    return (kept.get("class_names") if is_kept else None) or (image_set and image_set.class_names) or names


def make_labelling(model: Any, image_set: ImageSet | None, kept: dict[str, Any], names: Any = None,
        tokenizer: Any = None) -> Nothing:  # fmt: skip
    """What the network of a configuration is conditioned on: what the run has `kept`, or else what the images have, or the
    data set is known to have, class `names` and the captions of Fashion-MNIST. Captions without a tokenizer train one.
    Raises UserError if the network needs captions and there are none."""
    if "tokens" in model.cond_fields:
        table = caption_table(image_set, kept)
        names = caption_names(table, image_set, kept, names)
        tokenizer = kept.get("tokenizer") or tokenizer
        if not tokenizer and table == CAPTIONS and model.vocab_size < 256:  # too few for byte pairs
            tokenizer = FASHION_WORDS
        if not tokenizer:
            every = [caption for row in table for caption in row]
            tokenizer = BytePairs.train(every, model.vocab_size, model.max_length)
        needed = tokenizer.vocab_size, tokenizer.max_length
        if needed[0] > model.vocab_size or needed[1] != model.max_length:
            raise UserError("the captions need --model.vocab-size {} --model.max-length {}".format(*needed))
        null = tokenizer.encode([""])[0] if model.null_label is None else model.null_label
        return Captions(table, tokenizer, names, null)
    if model.num_classes is None:
        return Nothing()
    names = kept.get("class_names") or (image_set and image_set.class_names) or names
    return Classes(model.num_classes, model.null_label, names)


def old_class_names(image_set: ImageSet) -> list[str] | None:
    """The classes of a folder in the order that runs without labels.json have: by name, and those with images alone."""
    own = image_set.class_names
    return own and sorted(own[i] for i in np.unique(image_set.labels))  # type: ignore[return-value]


def in_turn(num: int, count: int) -> np.ndarray:
    """(num,) int32 in [0, count): each in turn, or evenly spaced ones of more than `MOST_IN_TURN`."""
    stride = max(count // num, 1) if count > MOST_IN_TURN else 1
    return (np.arange(num) * stride % count).astype(np.int32)


def keep(folder: Path, labelling: Nothing) -> None:
    """Write labels.json, if there is something to keep."""
    if record := labelling.record():
        write_json(folder / FILE, record)


def read_kept(folder: Path) -> dict[str, Any]:
    """The class names, captions and tokenizer in a run's labels.json, as far as it has them; {} if there is none. Raises
    UserError if it is damaged."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        record = read_json(path)
        if problem := find_problem(record, dict[str, Any]):
            raise ValueError(problem)
        kept = {"class_names": texts(record["class_names"])} if "class_names" in record else {}
        kept |= {"captions": tuple(map(texts, record["captions"]))} if "captions" in record else {}
        return kept | ({"tokenizer": Tokenizer.from_record(record["tokenizer"])} if "tokenizer" in record else {})
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it from where the run was made") from e


def texts(values: Any) -> tuple[str, ...]:
    """Texts of a JSON list. Raises ValueError if it is none, or is empty."""
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r:.100} is no list of texts")
    return tuple(values)
