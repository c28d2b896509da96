"""Tokenizers: trained ones, and CLIP's and BERT's against those of transformers."""

import functools
import json
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pipelines import CHINESE, PROMPTS, TEXTS, clip_folder

from ms_diffusion.data.tokenizers import BYTES, BytePairs, Tokenizer, WordPieces
from ms_diffusion.runtime import UserError

OLD = unicodedata.ucd_3_2_0  # transformers' own table for BERT is old too, and newer characters are in no vocabulary
KNOWN = st.characters(exclude_categories=["Cs", "Cn", "Co"], max_codepoint=0xFFFF).filter(
    lambda char: OLD.category(char) == unicodedata.category(char)
)


def decoded(tokenizer, row) -> str:
    """The text of a row of a trained tokenizer, with a space before each word."""
    symbols = {number: symbol for symbol, number in tokenizer.vocabulary.items()}
    byte_of = {char: byte for byte, char in BYTES.items()}
    return bytes(byte_of[char] for number in row if number for char in symbols[int(number)]).decode()


def same(a, b, texts):
    assert (a.vocab_size, a.max_length, a.pad) == (b.vocab_size, b.max_length, b.pad)
    np.testing.assert_array_equal(a.encode(texts), b.encode(texts))


# Trained


def test_the_most_frequent_pairs_are_merged_first():
    """Sennrich et al. 2016, algorithm 1, by hand: pairs of "ab ab abc", each word after a space."""
    tokenizer = BytePairs.train(["ab ab abc"], 258)
    space, (a, b, c) = "Ġ", "abc"
    # "Ġa" and "ab" occur 3 times each: "ab" is the first of them in order
    assert [*tokenizer.ranks] == [(a, b), (space, a + b)]
    assert tokenizer.vocab_size == 258 and tokenizer.max_length == 4
    assert tokenizer.encode(["ab abc"]).tolist() == [[258, 258, tokenizer.vocabulary[c], 0]]


def test_nothing_is_merged_that_occurs_once():
    assert BytePairs.train(["abc"], 1000).vocab_size == 256


@pytest.mark.parametrize("texts", [TEXTS, CHINESE])
def test_a_trained_tokenizer(texts):
    tokenizer = BytePairs.train(texts, 400)
    rows = tokenizer.encode(texts)
    assert rows.shape == (len(texts), tokenizer.max_length) and rows.dtype == np.int32
    assert rows.min() == 0 and rows.max() <= tokenizer.vocab_size <= 400
    assert (rows > 0).any(0).all()  # max_length is that of the longest
    for text, row in zip(texts, rows, strict=True):
        used = np.count_nonzero(row)
        assert tokenizer.length(text) == used and (row[:used] > 0).all()  # and then only 0
        assert decoded(tokenizer, row).replace(" ", "") == text.replace(" ", "")
    same(tokenizer, BytePairs.train(texts, 400), texts)
    same(tokenizer, Tokenizer.from_record(json.loads(json.dumps(tokenizer.to_record()))), texts + ["Unseen  ТЕКСТ é"])
    assert BytePairs.train(texts, 256).length(texts[0]) > tokenizer.length(texts[0])


def test_chinese_characters_are_words():
    tokenizer = BytePairs.train(CHINESE * 2, 1000)
    assert [tokenizer.length(text) for text in CHINESE] == [2, 4, 4, 2, 1, 5]


def test_case_and_spaces_do_not_matter_and_long_texts_are_cut():
    tokenizer = BytePairs.train(TEXTS, 300, max_length=3)
    np.testing.assert_array_equal(*[tokenizer.encode([text]) for text in ("Red\u00a0 HEART", " red heart\n")])
    assert tokenizer.encode(["low lower lowest"]).tolist() == [tokenizer.ids("low lower lowest")[:3]]
    assert tokenizer.encode([]).shape == (0, 3) and not tokenizer.encode(["", " \t"]).any()
    composed, apart = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    np.testing.assert_array_equal(tokenizer.encode([composed]), tokenizer.encode([apart]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.text(max_size=40))
@example(["हिन्दी ไทย"], "\ud800")
def test_any_text_has_tokens(texts, other):
    tokenizer = BytePairs.train(texts, 300)
    rows = tokenizer.encode([*texts, other])
    assert rows.min() >= 0 and rows.max() <= tokenizer.vocab_size
    lowered = unicodedata.normalize("NFC", other).lower()
    if lowered.isprintable() and "\u03c2" not in lowered:
        tokenizer.max_length = 1000
        assert decoded(tokenizer, tokenizer.encode([other])[0]).replace(" ", "") == lowered.replace(" ", "")


def test_twenty_thousand_captions_take_a_second():
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(3000)]
    texts = [" ".join(words[i] for i in row) for row in rng.zipf(1.5, (20_000, 8)) % 3000]
    start = time.process_time()
    tokenizer = BytePairs.train(texts, 2000)
    tokenizer.encode(texts)
    assert time.process_time() - start < 20
    assert tokenizer.vocab_size == 2000


@pytest.mark.parametrize(("size", "length"), [(255, None), (300, 0)])
def test_sizes_that_no_tokenizer_has(size, length):
    with pytest.raises(UserError, match="choose at least"):
        BytePairs.train(TEXTS, size, length)


# CLIP's and BERT's


def bert_file(path):
    special, whole = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK]", "low new , . ! ' it red heart 红 心 3 1"
    pieces = f"{special} a photo of cat ##s ##t wide ##r ##e ##est {whole}"
    path.write_text("\n".join(pieces.split()) + "\n", encoding="utf-8")
    return path


def test_clip_by_hand(tmp_path):
    tokenizer = BytePairs.read(clip_folder(tmp_path / "clip", pad="!", length=6))
    number, last = tokenizer.vocabulary, tokenizer.vocab_size - 1
    assert tokenizer.encode(["Q!"]).tolist() == [
        [last - 1, number["q</w>"], number["!</w>"], last, number["!"], number["!"]]
    ]
    assert tokenizer.encode(["q q q q q"]).tolist() == [[last - 1, *[number["q</w>"]] * 4, last]]
    same(tokenizer, Tokenizer.from_record(json.loads(json.dumps(tokenizer.to_record()))), PROMPTS)


def test_bert_by_hand(tmp_path):
    tokenizer = WordPieces.read(bert_file(tmp_path / "vocab.txt"), 8)
    assert tokenizer.encode(["A  cats, WÏDER x红"]).tolist() == [[3, 6, 9, 10, 16 + 2, 12, 13, 4]]
    same(tokenizer, Tokenizer.from_record(json.loads(json.dumps(tokenizer.to_record()))), PROMPTS)


@functools.cache
def peers(folder):
    """Ours and those of transformers for a folder with files of both."""
    transformers = pytest.importorskip("transformers")
    clip, bert = folder / "clip", folder / "vocab.txt"
    theirs = transformers.CLIPTokenizer.from_pretrained(clip), transformers.BertTokenizer(str(bert))
    return dict(
        zip(("clip", "bert"), zip((BytePairs.read(clip), WordPieces.read(bert, 20)), theirs, strict=True), strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    clip_folder(path / "clip")
    bert_file(path / "vocab.txt")
    return path


def same_as_theirs(kind, folder, texts):
    ours, theirs = peers(folder)[kind]
    rows = theirs(texts, padding="max_length", truncation=True, max_length=20)["input_ids"]
    assert ours.encode(texts).tolist() == rows


@pytest.mark.slow  # to import transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_as_in_transformers(kind, folder):
    same_as_theirs(kind, folder, PROMPTS + TEXTS + CHINESE)

    @settings(deadline=None, max_examples=300)
    @given(st.text(KNOWN, max_size=30))
    def any_text(text):
        same_as_theirs(kind, folder, [text])

    any_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_folder_that_transformers_has_written(folder, tmp_path):
    ours, theirs = peers(folder)["clip"]
    theirs.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):  # older releases write these too
        (tmp_path / name).unlink(missing_ok=True)
    same(ours, BytePairs.read(tmp_path), PROMPTS)


# What is no tokenizer


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "vocab.json").unlink(),
        lambda path: (path / "merges.txt").unlink(),
        lambda path: (path / "vocab.json").write_text("[1"),
        lambda path: (path / "vocab.json").write_text("[1]"),
        lambda path: (path / "vocab.json").write_text('{"a": "b"}'),
        lambda path: (path / "vocab.json").write_text('{"a": 1}'),
        lambda path: (path / "merges.txt").write_bytes(b"\xff\xfe"),
        lambda path: (path / "merges.txt").write_text("a b c\n"),
        lambda path: (path / "tokenizer_config.json").write_text('{"pad_token": "nowhere"}'),
        lambda path: (path / "tokenizer_config.json").write_text('{"model_max_length": 1}'),
        lambda path: (path / "tokenizer_config.json").write_text("3"),
    ],
)
def test_spoilt_files_of_clip(spoil, tmp_path):
    spoil(clip_folder(tmp_path / "clip"))
    with pytest.raises(UserError) as caught:
        BytePairs.read(tmp_path / "clip")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff", b"a\nb\n", b""])
def test_spoilt_files_of_bert(content, tmp_path):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="vocabulary"):
        WordPieces.read(path)


RECORDS = [
    None,
    {},
    {"kind": []},
    {"kind": "byte-pairs"},
    {"kind": "byte-pairs", "max_length": 3, "merges": [3]},
    {"kind": "byte-pairs", "max_length": 0, "merges": []},
    {"kind": "byte-pairs", "max_length": 3, "merges": "ab"},
    {"kind": "clip", "max_length": 3, "merges": [], "vocabulary": {"<|endoftext|>": 0}},
    {"kind": "word-pieces", "max_length": 1, "vocabulary": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]},
    {"kind": "word-pieces", "max_length": 3, "vocabulary": [1]},
]


@pytest.mark.parametrize("record", RECORDS)
def test_records_of_no_tokenizer(record):
    with pytest.raises(ValueError):
        Tokenizer.from_record(record)
