"""Folders of pictures: which files are read, their classes, captions and splits, and what is said of the others."""

import json
import os
import socket
import zlib
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from ms_diffusion import files
from ms_diffusion.data.image_folder import load_image_folder
from ms_diffusion.runtime import UserError

pytestmark = pytest.mark.filterwarnings("error")


def test_image_folder_labels_order_and_extensions(tmp_path):
    for i, name in enumerate(["b/2.PNG", "b/deep/1.bmp", "a/x.gif", "a/y.webp", "d/z.TIFF", "a/.hidden.png", "d/a.tif"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), 30 * i).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = load_image_folder(tmp_path, 6, 1)
    images, labels, class_names = found.images, found.labels, found.class_names
    assert images.shape == (6, 6, 6, 1) and images.dtype == np.uint8 and labels.dtype == np.int32
    assert images[:, 0, 0, 0].tolist() == [60, 90, 0, 30, 180, 120]
    assert labels.tolist() == [0, 0, 1, 1, 3, 3] and class_names == ("a", "b", "c", "d")
    assert found.captions is None and found.caption_ids is None


def one(tmp_path, size=4, channels=3):
    found = load_image_folder(tmp_path, size, channels)
    images, labels = found.images, found.labels
    assert images.shape == (1, size, size, channels) and labels.tolist() == [0]
    return images[0]


def test_image_folder_exif_orientation(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: above becomes right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    out = one(tmp_path, 8)
    assert out[:, 4:].min() > 250 and out[:, :4].max() < 5


@pytest.mark.parametrize("mode, colour", [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)])
def test_image_folder_transparent_is_white(tmp_path, mode, colour):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert (one(tmp_path) == 255).all()


def test_image_folder_half_transparent_red(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert one(tmp_path)[0, 0].tolist() == [255, 127, 127]


def test_image_folder_gray_and_colour(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    assert (one(tmp_path, channels=1) == 76).all()  # 0.299 * 255
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    assert (one(tmp_path, channels=3) == 7).all()


def test_image_folder_16_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8234, np.uint16)).save(tmp_path / "a.png")
    assert (one(tmp_path, channels=1) == 0x82).all()


def test_image_folder_keeps_the_middle(tmp_path):
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 200
    for turned in (pixels, pixels.T.copy()):
        Image.fromarray(turned).save(tmp_path / "a.png")
        assert (one(tmp_path, 8, 1) == 200).all()
        assert one(tmp_path, 4, 1)[1:3, 1:3].min() >= 199  # resized by the shorter side


def test_image_folder_first_frame(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (50, 150)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (one(tmp_path) == 50).all()


def test_image_folder_names_and_skips_the_unreadable(tmp_path, capsys):
    Image.effect_noise((16, 16), 50).save(tmp_path / "b.png")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:120])
    Image.fromarray(np.full((4, 4), 1e9, np.float32)).save(tmp_path / "floats.tif")
    one(tmp_path)
    err = capsys.readouterr().err
    assert all(name in err for name in ("text.jpg", "cut.png", "floats.tif")) and "b.png" not in err
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match="no readable image"):
        load_image_folder(tmp_path, 4, 3)


def test_image_folder_reads_regular_files_alone(tmp_path, capsys):
    """Nothing else is opened for its content, and a loop of links ends."""
    for i, name in enumerate(["a/x.png", "b.png/y.png"]):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4), i).save(tmp_path / name)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b.png" / "link.png").symlink_to("../a/x.png")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(os.path.relpath(tmp_path / "a" / "socket.png"))
        for options in ({}, {"validation": 1e-9}):
            found = load_image_folder(tmp_path, 4, 1, **options)
            images, labels = found.images, found.labels
            assert images[:, 0, 0, 0].tolist() == [0, 0, 1] and labels.tolist() == [0, 1, 1]
            lines = sorted(capsys.readouterr().err.splitlines())
            assert len(lines) == 6 and all(line.startswith(f"skipped {tmp_path}") for line in lines)
            for name in ("pipe.png", "zero.png", "gone.png", "self.png", "up", "socket.png"):
                assert any(f"/{name}: " in line for line in lines)


def test_image_folder_of_odd_names(tmp_path, capsys):
    """A name may hold what a pattern, a line or UTF-8 does not."""
    for name in (b"[a]*?.png", b"\xff.png", "\u00e4 b.png".encode(), b"-c.png", b"two\nlines.png"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"\xff"), exist_ok=True)
        Image.new("L", (4, 4), 9).save(os.path.join(os.fsencode(tmp_path), b"\xff", name), "PNG")
    (tmp_path / "[b]").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "[b]" / "*.png")
    assert len(load_image_folder(tmp_path, 4, 1).images) == 6
    (tmp_path / os.fsdecode(b"\xff") / "two\nlines.png").write_text("no picture")
    assert len(load_image_folder(tmp_path, 4, 1).images) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1


def png(width, height, content):
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def test_image_folder_skips_bombs(tmp_path, capsys, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, zlib.compress(bytes(10**6))))
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # PIL would start a program
    Image.new("L", (3000, 3000)).save(tmp_path / "large.png")  # fine
    assert len(load_image_folder(tmp_path, 4, 1).images) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and any("cut off" in line for line in lines)
    monkeypatch.setattr(files, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match="no readable image"):
        load_image_folder(tmp_path, 4, 1)
    assert "memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="memory"):
        load_image_folder(tmp_path, 10_000, 3)


def test_odd_pictures_are_read_without_warnings(tmp_path):
    image, exif = Image.new("L", (4, 4), 7), Image.Exif()
    exif[0x010E] = "text"
    image.save(tmp_path / "a.jpg", exif=exif.tobytes()[:-9])  # PIL warns of it
    assert (one(tmp_path, channels=1) == 7).all()


def test_image_folder_bad_input(tmp_path):
    with pytest.raises(UserError, match="nowhere.*no such folder"):
        load_image_folder(tmp_path / "nowhere", 4, 3)
    with pytest.raises(UserError, match="no readable image"):
        load_image_folder(tmp_path, 4, 3)
    with pytest.raises(UserError, match="not 2"):
        load_image_folder(tmp_path, 4, 2)


# Classes and captions


def paint(folder, *names):
    """Small pictures; the first pixel of each is its number."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(folder / name, "PNG")


def said_of(folder, **options):
    """{number of a picture: (class name or None, captions or None)}, and the class names."""
    found = load_image_folder(folder, 4, 1, **options)
    labels, names = found.labels, found.class_names
    kinds = [None] * len(labels) if names is None else [names[label] for label in labels]
    texts = [None] * len(labels) if found.captions is None else [found.captions[i] for i in found.caption_ids]
    return dict(zip(found.images[:, 0, 0, 0].tolist(), zip(kinds, texts, strict=True), strict=True)), names


def test_classes_are_in_natural_order_and_empty_ones_keep_their_number(tmp_path, capsys):
    paint(tmp_path, "10/a.png", "2/a.png", "2/deep/b.png", "x10/a.png", "x9/a.png")
    (tmp_path / "1").mkdir()
    paint(tmp_path, "__MACOSX/2/._a.png", "@eaDir/a.png", ".git/a.png")  # no classes
    found, names = said_of(tmp_path)
    assert names == ("1", "2", "10", "x9", "x10")
    assert {i: kind for i, (kind, _) in found.items()} == {0: "10", 1: "2", 2: "2", 3: "x10", 4: "x9"}
    assert "folder 1 holds no picture" in capsys.readouterr().err


def test_pictures_beside_class_folders_are_refused(tmp_path):
    paint(tmp_path, "a/1.png", "b/2.png", "3.png")
    with pytest.raises(UserError, match="3.png lies beside the class folders a, b: move"):
        load_image_folder(tmp_path, 4, 1)
    (tmp_path / "3.txt").write_text("a caption says more")
    assert said_of(tmp_path)[1] is None
    (tmp_path / "3.txt").unlink()
    (tmp_path / "3.png").unlink()
    assert said_of(tmp_path)[1] == ("a", "b")


def test_splits_are_no_classes(tmp_path):
    paint(tmp_path, "train/a/1.png", "test/a/2.png")
    with pytest.raises(UserError, match="splits test, train.*data.dir .*train"):
        load_image_folder(tmp_path, 4, 1)
    assert said_of(tmp_path / "train")[1] == ("a",)


def test_text_files_beside_pictures(tmp_path, capsys):
    paint(tmp_path, "a/0.png", "a/1.jpg", "b/2.png", "b/3.png")
    (tmp_path / "a/0.txt").write_bytes(b"\xef\xbb\xbfone  kite\r\n\r\n \xe7\xba\xa2\xe8\x89\xb2\r\n")
    (tmp_path / "a/1.txt").write_text("a cat")
    (tmp_path / "b/3.txt").write_text("a cat\n")
    (tmp_path / "b/other.txt").write_text("of no picture")
    found, names = said_of(tmp_path)
    assert names == ("a", "b")
    assert found == {0: ("a", ("one kite", "\u7ea2\u8272")), 1: ("a", ("a cat",)), 2: ("b", ("",)), 3: ("b", ("a cat",))}
    assert len(load_image_folder(tmp_path, 4, 1).captions) == 3  # each once
    err = capsys.readouterr().err
    assert "1 of 4 pictures have no caption: b/2.png" in err and "1 .txt" in err
    (tmp_path / "b/3.txt").write_bytes("\u7ea2".encode("gbk"))
    with pytest.raises(UserError, match="3.txt is not UTF-8"):
        load_image_folder(tmp_path, 4, 1)


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_metadata_with_captions(tmp_path, capsys):
    paint(tmp_path, "0.png", "sub/1.png", "sub/2.png", "3.png")
    rows = [{"file_name": "0.png", "text": "a kite"}, {"file_name": "sub/1.png", "text": ["a cat", "a pet"], "more": 1}]
    rows += [{"file_name": "./sub\\2.png", "text": None}, {"file_name": "gone.png", "text": "nothing"}]
    (tmp_path / "metadata.jsonl").write_text(jsonl(*rows))
    found, names = said_of(tmp_path)
    assert found == {0: (None, ("a kite",)), 1: (None, ("a cat", "a pet")), 2: (None, ("",))} and names is None
    err = capsys.readouterr().err
    assert "skipped" in err and "3.png: no line of the metadata" in err and "line 4" in err
    assert "1 of 3 pictures have no caption: sub/2.png" in err
    (tmp_path / "metadata.jsonl").unlink()
    text = 'file_name,text\r\n0.png,"a ""red"" kite\nor two"\r\nsub/1.png,"cat, pet"\r\nsub/2.png,\r\n3.png,last\r\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + text, newline="")
    found, _ = said_of(tmp_path)
    assert [found[i][1] for i in range(4)] == [('a "red" kite', "or two"), ("cat, pet",), ("",), ("last",)]


def test_metadata_with_labels(tmp_path):
    paint(tmp_path, *(f"folder/{i}.png" for i in range(3)))
    for labels, names, found in (
        (("10 cats", "9 dogs", "10 cats"), ("9 dogs", "10 cats"), ["10 cats", "9 dogs", "10 cats"]),
        ((3, 0, 1), ("0", "1", "2", "3"), ["3", "0", "1"]),
        (("1", "0", "1"), ("0", "1"), ["1", "0", "1"]),
    ):
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "folder" / "metadata.jsonl").write_text(jsonl(*rows))
        kinds, class_names = said_of(tmp_path)
        assert class_names == names and [kinds[i][0] for i in range(3)] == found
    rows = [{"file_name": f"{i}.png", "label": "x", "text": "y"} for i in range(3)]
    (tmp_path / "folder" / "metadata.jsonl").write_text(jsonl(*rows))
    assert said_of(tmp_path) == ({i: ("x", ("y",)) for i in range(3)}, ("x",))


ROW = {"file_name": "0.png", "text": "a kite"}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metadata.jsonl", jsonl(ROW, ROW), "line 1 and .*line 2 both name 0.png"),
        ("metadata.jsonl", jsonl(ROW, {**ROW, "file_name": "sub/../0.png"}), "both name"),
        ("metadata.jsonl", jsonl(ROW) + "{", "line 2, is no JSON"),
        ("metadata.jsonl", "[" * 100_000, "line 1, is no JSON"),
        ("metadata.jsonl", "[1]", "line 1, is no object"),
        ("metadata.jsonl", jsonl({"text": "a"}), "line 1 has no file_name"),
        ("metadata.jsonl", jsonl({"file_name": 3, "text": "a"}), "line 1 has no file_name"),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "caption": "a"}), "fields file_name, caption: name"),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "text": 3}), "line 1: .text. is 3"),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "text": ["a", 3]}), "line 1: .text."),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "label": 1.5}), "line 1: .label. is 1.5"),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "label": -1}), "line 1: .label. is -1"),
        ("metadata.jsonl", jsonl({"file_name": "0.png", "label": "a"}, {"file_name": "1.png"}), "line 2 has no label"),
        ("metadata.jsonl", jsonl({"file_name": "other.png", "text": "a"}), "no readable image"),
        ("metadata.csv", "0.png,a kite\n", "first line"),
        ("metadata.csv", "name,text\n0.png,a kite\n", "line 2 has no file_name"),
        ("metadata.csv", 'file_name,text\n0.png,"a kite\n', "is no CSV"),
        ("metadata.csv", "", "no line of a picture"),
    ],
)
def test_wrong_metadata_are_named_in_one_line(tmp_path, name, content, words):
    paint(tmp_path, "0.png", "1.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        load_image_folder(tmp_path, 4, 1)
    assert "\n" not in str(raised.value)


def test_metadata_of_another_encoding(tmp_path):
    paint(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n0.png,\u7ea2\n".encode("gbk"))
    with pytest.raises(UserError, match="metadata.csv is not UTF-8"):
        load_image_folder(tmp_path, 4, 1)


# Validation


def test_the_validation_split_is_by_content(tmp_path):
    for i in range(60):
        folder = tmp_path / f"{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder / f"{i}-copy.png")
    parts = {split: load_image_folder(tmp_path, 4, 1, split=split, validation=0.2) for split in ("train", "test")}
    values = {split: part.images[:, 0, 0, 0] for split, part in parts.items()}
    assert not set(values["train"]) & set(values["test"]) and len(values["train"]) + len(values["test"]) == 120
    assert 8 <= len(values["test"]) <= 48 and parts["test"].class_names == ("0", "1")
    assert (parts["test"].labels == values["test"] % 2).all()
    for i in range(0, 60, 2):  # moved and renamed, added to
        (tmp_path / "0" / f"{i}.png").rename(tmp_path / "1" / f"moved {i}.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "0" / "new.png")
    again = load_image_folder(tmp_path, 4, 1, split="test", validation=0.2).images[:, 0, 0, 0]
    assert sorted(set(again) - {255}) == sorted(set(values["test"]))
    assert len(load_image_folder(tmp_path, 4, 1, split="test").images) == 121
    with pytest.raises(UserError, match="test split"):
        load_image_folder(tmp_path, 4, 1, split="test", validation=1e-9)


# Pictures of a folder together


def test_a_dark_picture_is_no_picture_of_fewer_bits(tmp_path, capsys):
    """Among 20 pictures of 16 bits; 10 of 12 bits beside them are a kind of their own."""
    for i in range(20):
        Image.fromarray(np.full((4, 4), 40_000 + i, np.uint16)).save(tmp_path / f"{i:02}.png")
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "dark.png")
    assert (load_image_folder(tmp_path, 4, 1).images[-1] == 700 >> 8).all() and not capsys.readouterr().err
    for i in range(10):
        Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / f"x{i}.png")
    images = load_image_folder(tmp_path, 4, 1).images[:, 0, 0, 0]
    assert images[-10:].tolist() == [4000 >> 4] * 10 and images[20] == 700 >> 4
    assert "12 or 16" in capsys.readouterr().err


def test_pages_and_other_files_are_noted(tmp_path, capsys):
    pages = [Image.new("L", (4, 4), value) for value in (50, 150)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.gif", save_all=True, append_images=pages[1:])
    for name in ("film.mp4", "film2.MP4", "photo.cr2", "noending"):
        (tmp_path / name).write_bytes(b"?")
    assert (load_image_folder(tmp_path, 4, 1).images == 50).all()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "2 .mp4, 1" in lines[0] and ".cr2" in lines[0] and lines[1].endswith("a.tif")


def test_many_skipped_files_are_counted(tmp_path, capsys):
    paint(tmp_path, "good.png")
    for i in range(120):
        (tmp_path / f"{i}.png").touch()
    assert len(load_image_folder(tmp_path, 4, 1).images) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 101 and "is empty" in lines[0] and lines[-1] == "skipped 20 more"


def test_the_matte_of_a_folder(tmp_path):
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert (load_image_folder(tmp_path, 4, 3, matte="#102030").images[0, 0, 0] == [16, 32, 48]).all()
