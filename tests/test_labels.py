"""What an image is called: classes and captions, what a run keeps of them, and a network of captions in pixel space."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from runs import assert_refused, call, checkpoint

from mindspore import Tensor

import ms_diffusion as md
from ms_diffusion.data.captions import CAPTIONS
from ms_diffusion.data.image_set import ImageSet
from ms_diffusion.data.tokenizers import BytePairs
from ms_diffusion.models.context import TextEmbedding
from ms_diffusion.models.layers import name_and_initialise
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.tasks.labels import Captions, Classes, in_turn, keep, make_labelling, old_class_names, read_kept

TABLE = (("red",), ("a green square", "green"), ("蓝色", "blue", "the blue one"))
TEXT = UnetConfig(
    dim=8, channels=3, dim_mults=(1,), use_convnext=False, resnet_block_groups=4, vocab_size=300, max_length=8, text_dim=16
)


def images(labels, names):
    return ImageSet(np.zeros((len(labels), 4, 4, 1), np.uint8), np.array(labels, np.int32), names)


def test_classes_keep_their_numbers():
    ours = Classes(3, 3, ("dog", "cat", "cow"))
    np.testing.assert_array_equal(ours.ids(images([0, 1, 1], ("cat", "dog"))), [1, 0, 0])  # another order, and one fewer
    np.testing.assert_array_equal(ours.ids(images([2, 0], None)), [2, 0])
    with pytest.raises(UserError, match="'bird'"):
        ours.ids(images([0, 1], ("cat", "bird")))
    np.testing.assert_array_equal(ours.ids(images([0, 0], ("cat", "bird"))), [1, 1])  # no image is of it


def test_runs_of_before_have_their_order():
    of_folder = images([0, 1, 3], ("1", "2", "9", "10"))  # "9" is empty
    assert old_class_names(of_folder) == ["1", "10", "2"]
    np.testing.assert_array_equal(Classes(3, 3, old_class_names(of_folder)).ids(of_folder), [0, 2, 1])


@pytest.mark.parametrize(("label", "number"), [("Cat", 1), ("1", 2), ("0", 0), ("2", 2), (np.int64(1), 1)])
def test_a_class_by_name_or_number(label, number):
    """A class that is called "1" goes by that name, wherever it stands."""
    assert Classes(3, 3, ("dog", "cat", "1")).label_array(label, 2).tolist() == [number] * 2


@pytest.mark.parametrize("label", ["horse", "3", -1, 4, 0.5, np.arange(3)])
def test_a_class_that_is_not_there(label):
    with pytest.raises(UserError):
        Classes(3, 3, ("dog", "cat", "1")).label_array(label, 2)


@pytest.mark.parametrize(("num", "count"), [(4, 10), (13, 10), (64, 1911), (1, 1911), (2000, 1911)])
def test_in_turn(num, count):
    chosen = in_turn(num, count)
    assert chosen.shape == (num,) and 0 <= chosen.min() and chosen.max() < count
    if num <= count:
        assert len(set(chosen)) == num
    if count < 100:
        np.testing.assert_array_equal(chosen, np.arange(num) % count)


def test_captions_are_drawn_alike_from_rows_of_different_length():
    tokenizer = BytePairs.train([text for row in TABLE for text in row], 300, 8)
    captions = Captions(TABLE, tokenizer)
    for i, row in enumerate(TABLE):
        drawn = captions.draw(np.random.default_rng(i), np.full(3000, i), 0.25)
        counts = [(drawn == tokenizer.encode([text])).all(1).sum() for text in row] + [(drawn == 0).all(1).sum()]
        assert sum(counts) == 3000
        expected = [3000 * 0.75 / len(row)] * len(row) + [750]
        assert np.abs(np.array(counts) - expected).max() < 120
    np.testing.assert_array_equal(captions.rows(2, None, "red"), tokenizer.encode(["red"] * 2))
    np.testing.assert_array_equal(captions.rows(4), tokenizer.encode(["red", "a green square", "蓝色", "red"]))
    assert captions.titles([2, 0]) == ["蓝色", "red"]


def test_a_run_keeps_what_its_labels_mean(tmp_path):
    assert read_kept(tmp_path) == {}
    keep(tmp_path, Classes(2, 2, ("猫", "dog")))
    assert read_kept(tmp_path) == {"class_names": ("猫", "dog")}
    with_captions = replace(images([0, 0], None), captions=TABLE, caption_ids=np.array([2, 0], np.int32))
    first = make_labelling(TEXT, with_captions, {})
    keep(tmp_path, first)
    kept = read_kept(tmp_path)
    again = make_labelling(TEXT, None, kept)
    assert again.table == TABLE
    np.testing.assert_array_equal(again.rows(1, None, "the blue square"), first.rows(1, None, "the blue square"))
    more = replace(with_captions, captions=(*TABLE, ("something else entirely",)))
    np.testing.assert_array_equal(make_labelling(TEXT, more, kept).rows(3), first.rows(3))  # the tokenizer that it had


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"class_names": "cat"}', '{"class_names": [1]}', '{"class_names": []}', '{"captions": [["a"], []]}',
     '{"captions": ["a"]}', '{"captions": 1}', '{"tokenizer": 1}', '{"tokenizer": {"kind": "words", "words": [1]}}',
     '{"tokenizer": {"kind": "words", "words": ["a"], "max_length": 1e9}}', '{"tokenizer": {"kind": "x"}}'],
)  # fmt: skip
def test_damaged_labels_are_one_line(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_kept(tmp_path)
    assert "labels.json" in str(error.value) and "\n" not in str(error.value)


def test_captions_are_needed_and_fit():
    with pytest.raises(UserError, match="no captions"):
        make_labelling(TEXT, images([0], None), {})
    fashion = ImageSet(*md.load_images("fashion-mnist-mini", None, "test", 28, 1))
    with pytest.raises(UserError, match="--model.max-length 8"):
        captioned = replace(fashion, captions=CAPTIONS, caption_ids=fashion.labels)
        make_labelling(replace(TEXT, max_length=7, vocab_size=100), captioned, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"num_classes": 3}, "num_classes"), ({"max_length": 0}, "max_length"), ({"with_time_emb": False}, "with_time_emb")],
)
def test_networks_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(TEXT, **values).build()


def test_a_text_embedding_is_a_mean_over_tokens():
    net = TextEmbedding(20, 5, 8, 3)
    name_and_initialise(net, 1)
    tokens = np.array([[3, 4, 0, 0, 0], [7, 1, 2, 5, 6], [0, 0, 0, 0, 0]], np.int32)
    words = net.encoder(Tensor(tokens)).asnumpy().astype(np.float64)
    used = (tokens != 0).astype(np.float64)
    mean = (words * used[..., None]).sum(1) / np.maximum(used.sum(1), 1)[:, None]
    weight, bias = net.proj.weight.asnumpy(), net.proj.bias.asnumpy()
    for ours in (net, md.compiled(net)):
        np.testing.assert_allclose(ours(Tensor(tokens)).asnumpy(), mean @ weight.T + bias, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_captions_in_any_language(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(24):
        name, colour = [("a red square", "红色"), ("a blue square", "蓝色")][i % 2], [(255, 0, 0), (0, 0, 255)][i % 2]
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("\n".join(name), "utf-8")
    train = md.ImageTrainConfig(total_steps=3, batch_size=8, sample_num=4, sample_steps=2, save_every=2)
    config = md.PixelConfig(
        data=md.DataConfig("image-folder", str(folder), size=8, flip=False),
        diffusion=md.DiffusionConfig(num_timesteps=20),
        model=TEXT,
        train=train,
    )
    run = md.train(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert kept["captions"] == [["a red square", "红色"], ["a blue square", "蓝色"]]
    options = {"steps": 2, "guidance": 3.0, "raw": True}
    red, blue = (run.sample(2, prompt=text, **options) for text in ("红色", "a blue square"))
    assert red.shape == (2, 3, 8, 8) and not np.array_equal(red, blue)
    away = run.sample(2, prompt="红色", negative_prompt="蓝色", **options)
    assert not np.array_equal(away, red)
    null = run.sample(2, prompt="红色", negative_prompt="", **options)
    np.testing.assert_array_equal(null, red)  # an empty text is no caption

    # Another process: the same prompt, the same picture; and the run goes on where it stopped
    again = md.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(2, prompt="红色", **options), red)
    assert call("sample", again.home, "--prompt", "红色", "--num", 2, "--steps", 2, "--out", tmp_path / "a.png")[0] == 0
    assert_refused(call("sample", again.home, "--negative-prompt", "x", "--num", 2, "--steps", 2), "--guidance")
    longer = md.train(replace(config, train=replace(train, total_steps=4)), tmp_path / "run")
    assert longer.step == 4 and checkpoint(tmp_path / "run", 4).is_dir()
