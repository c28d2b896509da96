"""Tokenizers: from texts to rows of numbers, which a text encoder takes.

`BytePairs.train` learns one from the captions of a data set, in any language. `BytePairs.read` reads CLIP's and
`WordPieces.read` BERT's, as their authors published them.
"""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from ..fields import Bounds, find_problem
from ..files import read_bytes, read_json
from ..runtime import UserError

Pair = tuple[str, str]
LENGTH = 77  # tokens of a text, of CLIP and of CompVis's BERT, where their files do not say
VOCABULARY_BYTES = 1 << 26


class Tokenizer:
    """Texts as rows of `max_length` numbers.

    A kind defines `ids`, `to_record` and `read_record`, and `kind`, its name in a record.

    Attributes:
        vocab_size: What an embedding of the numbers must hold: `vocab_size` + 1 rows for a trained tokenizer, whose 0 is
            no token, else `vocab_size` rows.
        max_length: The length of a row; `encode` cuts longer texts.
        pad: The number that fills the row up."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}
    vocab_size: int
    max_length: int
    pad: int = 0
    start: tuple[int, ...] = ()  # what every row begins with
    end: tuple[int, ...] = ()  # what follows the text

    def __init_subclass__(cls) -> None:
        Tokenizer.kinds[cls.kind] = cls

    def ids(self, text: str) -> list[int]:
        """The numbers of the whole text, of any length, without start and end."""
        raise NotImplementedError

    def length(self, text: str) -> int:
        """The length of the row that the whole text needs; if it is above max_length, `encode` cuts the text."""
        return len(self.start) + len(self.ids(text)) + len(self.end)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The rows of N texts: (N, max_length) int32."""
        rows = np.full((len(texts), self.max_length), self.pad, np.int32)
        room = self.max_length - len(self.start) - len(self.end)
        for row, text in zip(rows, texts, strict=True):
            ids = [*self.start, *self.ids(text)[:room], *self.end]
            row[: len(ids)] = ids
        return rows

    def to_record(self) -> dict[str, Any]:
        """What `from_record` makes the same tokenizer of, as plain JSON."""
        raise NotImplementedError

    @classmethod
    def read_record(cls, record: dict[str, Any]) -> "Tokenizer":
        """A tokenizer of this kind. Raises ValueError if the record is none of its."""
        raise NotImplementedError

    @staticmethod
    def from_record(record: Any) -> "Tokenizer":
        """The tokenizer of which `to_record` made this. Raises ValueError if the record is of no tokenizer."""
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in list(Tokenizer.kinds):
            raise ValueError(f"unknown kind {kind!r:.200} of a tokenizer: it is one of {', '.join(Tokenizer.kinds)}")
        return Tokenizer.kinds[kind].read_record(record)


# Characters


class _Cached(dict):
    """A table for `str.translate` that computes what it does not hold yet."""

    def __init__(self, function: Callable[[str], str]):
        super().__init__()
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


def is_ideograph(char: str) -> bool:
    """Whether this is a Chinese character, which is a word of its own; kana and hangul are not."""
    return unicodedata.category(char) == "Lo" and unicodedata.name(char, "").startswith("CJK ")


def _shape(char: str) -> str:
    """An ASCII character itself, any other as one of its kind: so regular expressions see letters, which Python's own have
    no class for."""
    category = unicodedata.category(char)
    if char < "\x80":
        return char
    if category[0] == "Z" or char == "\x85":
        return " "
    kinds = {"L": "一" if is_ideograph(char) else "a", "M": "\u0300", "N": "0"}
    return kinds.get(category[0], "!")


SHAPES = _Cached(_shape)
LOWER = _Cached(str.lower)  # of each character alone: str.lower writes a sigma at the end of a word in another way


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    """The parts of a text whose shape matches the pattern."""
    return [text[match.start() : match.end()] for match in pattern.finditer(text.translate(SHAPES))]


# Byte pairs

# Each byte as a printable character, as in GPT-2 (Radford et al. 2019) and so in CLIP's files
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}

IN_TRAINED = re.compile("[a-z\u0300]+|一\u0300*|[0-9]|[^\\sa-z\u0300一0-9]+", re.ASCII)
IN_CLIP = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z一]+|[0-9]|[^\sa-z一0-9]+", re.ASCII)
CLIP_SPECIAL = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")


def merge(symbols: list[str], pair: Pair) -> list[str]:
    """The symbols with the two of the pair as one, wherever they follow each other."""
    merged, i = [], 0
    while i < len(symbols):
        both = symbols[i] == pair[0] and symbols[i + 1 : i + 2] == [pair[1]]
        merged.append(pair[0] + pair[1] if both else symbols[i])
        i += 2 if both else 1
    return merged


class BytePairs(Tokenizer):
    """Byte pair encoding (Sennrich et al. 2016, algorithm 1) of UTF-8: every text has tokens, in any language.

    Case is ignored. Letters, each digit, each Chinese character and runs of other characters are words; a word's bytes,
    after a space, are merged in the order of `merges`. Number 0 is no token: it pads, and a row of 0 is "no text". Numbers 1
    to 256 are bytes, those above are merged pairs."""

    kind = "byte-pairs"

    def __init__(self, merges: Iterable[Pair], max_length: int):
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.max_length = max_length
        self.vocabulary = {symbol: i for i, symbol in enumerate(self.alphabet(), 1)}
        for left, right in self.ranks:
            self.vocabulary.setdefault(left + right, len(self.vocabulary) + 1)
        self.vocab_size = len(self.vocabulary)
        self._cache: dict[str, list[int]] = {}  # of words, which texts repeat

    @staticmethod
    def alphabet() -> list[str]:
        """The symbols before any merge."""
        return [*BYTES.values()]

    @staticmethod
    def words(text: str) -> list[str]:
        """The parts of a text that are encoded one by one."""
        return [" " + word for word in _split(IN_TRAINED, unicodedata.normalize("NFC", text).translate(LOWER))]

    @staticmethod
    def symbols(word: str) -> list[str]:
        """The bytes of a word."""
        return [BYTES[byte] for byte in word.encode(errors="surrogatepass")]

    def ids(self, text: str) -> list[int]:
        return [number for word in self.words(text) for number in self.ids_of_word(word)]

    def ids_of_word(self, word: str) -> list[int]:
        """The numbers of one of `words`."""
        if word not in self._cache:
            symbols = self.symbols(word)
            while len(symbols) > 1:
                best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if best not in self.ranks:
                    break
                symbols = merge(symbols, best)
            self._cache[word] = [self.number(symbol) for symbol in symbols]
        return self._cache[word]

    def number(self, symbol: str) -> int:
        return self.vocabulary[symbol]

    def to_record(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length, "merges": [" ".join(pair) for pair in self.ranks]}

    @classmethod
    def read_record(cls, record: dict[str, Any]) -> "BytePairs":
        return BytePairs(_pairs(record.get("merges")), _length(record, 1))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, max_length: int | None = None) -> "BytePairs":
        """The tokenizer with at most `vocab_size` tokens, at least 256, that needs few of them for these texts: the pair
        that is most frequent, the first in order of those that are equally so, is merged until no pair occurs twice.
        `max_length` is by default what the longest text needs. Raises UserError if vocab_size is below 256 or
        max_length below 1."""
        if vocab_size < len(BYTES):
            raise UserError(f"the size of the vocabulary is {vocab_size}: choose at least {len(BYTES)}, one for each byte")
        if max_length is not None and max_length < 1:
            raise UserError(f"the length of a text in tokens is {max_length}: choose at least 1")
        texts = list(texts)
        counts = Counter(word for text in texts for word in BytePairs.words(text))
        merges = _most_frequent_pairs([(BytePairs.symbols(word), n) for word, n in counts.items()], vocab_size - len(BYTES))
        tokenizer = BytePairs(merges, max_length or 1)
        if max_length is None:
            tokenizer.max_length = max([1, *map(tokenizer.length, texts)])
        return tokenizer

    @staticmethod
    def read(folder: str | Path) -> "ClipBytePairs":
        """CLIP's tokenizer, from a folder with vocab.json and merges.txt, or with tokenizer.json. Raises UserError if it has
        none of them, or they cannot be read."""
        folder = Path(folder)
        try:
            if (folder / "vocab.json").exists():
                text = read_bytes(folder / "merges.txt", VOCABULARY_BYTES).decode()
                lines = [line.removesuffix("\r") for line in text.split("\n")]
                merges = [line for line in lines[lines[0].startswith("#version") :] if line]
                model = {"vocab": read_json(folder / "vocab.json"), "merges": merges}
            elif (folder / "tokenizer.json").exists():
                model = _object(_object(read_json(folder / "tokenizer.json")).get("model"))
            else:
                raise ValueError("it has no vocab.json and merges.txt")
            record = {"vocabulary": model.get("vocab"), "merges": model.get("merges"), "max_length": LENGTH}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                settings = _object(read_json(folder / name)) if (folder / name).exists() else {}
                if token := settings.get("pad_token"):
                    record["pad"] = token.get("content") if isinstance(token, dict) else token
                if not find_problem(length := settings.get("model_max_length"), Annotated[int, Bounds(1, 1 << 20)]):
                    record["max_length"] = length  # transformers writes a number of 31 digits for none
            return ClipBytePairs.read_record(record)
        except (OSError, ValueError) as e:
            raise UserError(f"{folder} holds no tokenizer of CLIP that can be read: {_reason(e)}") from e


class ClipBytePairs(BytePairs):
    """CLIP's byte pairs (Radford et al. 2021), with the numbers in its vocabulary.

    A row is the start, the text in lower case, the end, and `pad`, which is the end again, or "!" for Stable Diffusion 2. A
    symbol that the vocabulary does not have becomes the end too."""

    kind = "clip"

    def __init__(self, vocabulary: dict[str, int], merges: Iterable[Pair], max_length: int = LENGTH, pad: str | None = None):
        super().__init__(merges, max_length)
        self.vocabulary, self.vocab_size = vocabulary, max(vocabulary.values()) + 1
        self.start, self.end = (vocabulary["<|startoftext|>"],), (vocabulary["<|endoftext|>"],)
        self.pad_symbol = pad or "<|endoftext|>"
        self.pad = self.number(self.pad_symbol)

    @staticmethod
    def words(text: str) -> list[str]:
        found = []
        for i, part in enumerate(CLIP_SPECIAL.split(text)):  # the odd ones are special
            found += [part] if i % 2 else _split(IN_CLIP, unicodedata.normalize("NFC", part).translate(LOWER))
        return found

    @staticmethod
    def symbols(word: str) -> list[str]:
        if CLIP_SPECIAL.fullmatch(word):
            return [word]
        *first, last = BytePairs.symbols(word)
        return [*first, last + "</w>"]

    def number(self, symbol: str) -> int:
        return self.vocabulary.get(symbol, self.end[0])

    def to_record(self) -> dict[str, Any]:
        return super().to_record() | {"vocabulary": self.vocabulary, "pad": self.pad_symbol}

    @classmethod
    def read_record(cls, record: dict[str, Any]) -> "ClipBytePairs":
        vocabulary: Any = record.get("vocabulary")
        pad: Any = record.get("pad")
        problem = find_problem(vocabulary, dict[str, Annotated[int, Bounds(0, 1 << 24)]]) or find_problem(pad, str | None)
        if problem:
            raise ValueError(f"the vocabulary, or its pad: {problem}")
        _check_special(vocabulary, {"<|startoftext|>", "<|endoftext|>", pad or "<|endoftext|>"})
        return ClipBytePairs(vocabulary, _pairs(record.get("merges")), _length(record, 2), pad)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds {value!r:.200} where an object should be")
    return value


def _length(record: dict[str, Any], least: int) -> int:
    """The length of a text in a record, at least that of its start and its end."""
    if problem := find_problem(record.get("max_length"), Annotated[int, Bounds(least, 1 << 20)]):
        raise ValueError(f"max_length: {problem}")
    return record["max_length"]


def _check_special(vocabulary: Collection[str], special: set[str]) -> None:
    if missing := special - set(vocabulary):
        raise ValueError(f"the vocabulary has no {min(missing)}")


def _pairs(merges: Any) -> list[Pair]:
    """The merges in a record: "a b", or ["a", "b"]. Raises ValueError if they are none."""
    merges = merges if isinstance(merges, list) else [None]
    pairs = [tuple(each.split(" ")) if isinstance(each, str) else each for each in merges]
    if any(not isinstance(pair, tuple | list) or [*map(type, pair)] != [str, str] for pair in pairs):
        raise ValueError("the merges are no list of pairs of symbols")
    return [(left, right) for left, right in pairs]


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _most_frequent_pairs(words: list[tuple[list[str], int]], most: int) -> list[Pair]:
    """At most this many pairs of symbols to merge, in order, of words and how often each occurs."""
    counts, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, and the indices of words that had it

    def count(i: int, sign: int) -> set[Pair]:
        symbols, n = words[i]
        pairs = [*zip(symbols, symbols[1:], strict=False)]
        for pair in pairs:
            counts[pair] += sign * n
            where[pair].add(i)
        return set(pairs)

    for i in range(len(words)):
        count(i, 1)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < most:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:
            continue  # an entry of before: the pair has another one if it still occurs
        if counts[pair] < 2:
            break
        merges.append(pair)
        changed = set()
        for i in where.pop(pair):
            changed |= count(i, -1)
            words[i] = merge(words[i][0], pair), words[i][1]
            changed |= count(i, 1)
        where.pop(pair, None)
        for each in changed - {pair}:
            if counts[each]:
                heapq.heappush(heap, (-counts[each], each))
    return merges


# Word pieces


def _clean(char: str) -> str:
    if char in "\t\n\r" or unicodedata.category(char)[0] == "Z":
        return " "
    if char in "\0\ufffd" or unicodedata.category(char)[0] == "C":
        return ""
    return f" {char} " if is_ideograph(char) else char


def _apart(char: str) -> str:
    """Punctuation between spaces; to BERT all of ASCII that is neither letter, digit nor space is punctuation."""
    return f" {char} " if unicodedata.category(char)[0] == "P" or char in "$+<=>^`|~" else char


CLEAN, APART = _Cached(_clean), _Cached(_apart)
WITHOUT_ACCENTS = _Cached(lambda char: "" if unicodedata.category(char) == "Mn" else char.lower())


class WordPieces(Tokenizer):
    """BERT's word pieces (Devlin et al. 2019, section 3; Wu et al. 2016, section 4.1), uncased.

    Words, punctuation and Chinese characters are split greedily into the longest pieces in `vocabulary`, where "##" begins
    what is not at the start of a word; a word that cannot be split is [UNK]. A row is [CLS], the text, [SEP] and [PAD]."""

    kind = "word-pieces"
    LONGEST = 100  # characters; a longer word is [UNK]

    def __init__(self, vocabulary: Sequence[str], max_length: int = LENGTH):
        self.vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
        self.vocab_size, self.max_length = len(vocabulary), max_length
        self.pad, self.unknown, start, end = [self.vocabulary[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
        self.start, self.end = (start,), (end,)

    def ids(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFD", text.translate(CLEAN)).translate(WITHOUT_ACCENTS).translate(APART)
        return [number for word in text.split(" ") if word for number in self.ids_of_word(word)]

    def ids_of_word(self, word: str) -> list[int]:
        """The numbers of a word's pieces."""
        ids, start = [], 0
        while start < len(word) <= self.LONGEST:
            pieces = ("##" * (start > 0) + word[start:end] for end in range(len(word), start, -1))
            if (piece := next((piece for piece in pieces if piece in self.vocabulary), None)) is None:
                break
            ids.append(self.vocabulary[piece])
            start += len(piece) - 2 * (start > 0)
        return ids if start == len(word) else [self.unknown]

    def to_record(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length, "vocabulary": [*self.vocabulary]}

    @classmethod
    def read_record(cls, record: dict[str, Any]) -> "WordPieces":
        vocabulary: Any = record.get("vocabulary")
        if not isinstance(vocabulary, list) or not all(isinstance(piece, str) for piece in vocabulary):
            raise ValueError("the vocabulary is no list of pieces")
        _check_special(vocabulary, {"[PAD]", "[UNK]", "[CLS]", "[SEP]"})
        return WordPieces(vocabulary, _length(record, 2))

    @staticmethod
    def read(path: str | Path, max_length: int = LENGTH) -> "WordPieces":
        """BERT's tokenizer, from its vocab.txt, a piece a line. Raises UserError if it cannot be read or is no such file."""
        try:
            lines = read_bytes(path, VOCABULARY_BYTES).decode().rstrip("\n").split("\n")
            vocabulary = [line.rstrip("\r") for line in lines]
            return WordPieces.read_record({"vocabulary": vocabulary, "max_length": max_length})
        except (OSError, ValueError) as e:
            raise UserError(f"{path} is no vocabulary that can be read: {_reason(e)}") from e
