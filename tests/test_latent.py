"""The first stage between images and latents, and images in overlapping patches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Tensor

from ms_diffusion import latent
from ms_diffusion.images import to_float
from ms_diffusion.latent import FirstStage, in_patches
from ms_diffusion.models.autoencoder import AutoencoderConfig, VQConfig

CONFIG = AutoencoderConfig(
    ch=4, ch_mult=(1, 2), num_res_blocks=1, channels=1, resolution=8, z_channels=3, embed_dim=2, groups=2, attention="none"
)
CODEBOOK = VQConfig(
    ch=4, ch_mult=(1, 2), num_res_blocks=1, channels=1, resolution=8, z_channels=3, embed_dim=2, groups=2, attention="none",
    n_embed=7,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (13, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def stage():
    """With batches of 5 images, so that all tests share two graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "PIXELS", 8 * 8 * 5)
        yield FirstStage(CONFIG.build(0), scale=2.5, f=2)


def test_moments_are_the_encoders_in_batches_that_do_not_divide(stage):
    expected = stage.net.encode(Tensor(to_float(IMAGES))).asnumpy()
    np.testing.assert_allclose(stage.moments(IMAGES), expected, atol=1e-5)
    assert expected.shape == (13, 4, 4, 4)


def test_decode_takes_scaled_latents(stage):
    z = np.random.default_rng(1).standard_normal((7, 2, 4, 4)).astype(np.float32)
    expected = stage.net.decode(Tensor(z)).asnumpy()
    np.testing.assert_allclose(stage.decode(2.5 * z), expected, atol=1e-5)
    assert expected.shape == (7, 1, 8, 8)


def test_reconstructions_decode_the_mean(stage):
    mean = stage.moments(IMAGES)[:, :2]
    np.testing.assert_allclose(stage.reconstruct(IMAGES), stage.net.decode(Tensor(mean)).asnumpy(), atol=1e-5)


def test_in_patches_it_agrees_with_the_network(stage):
    patched = FirstStage(stage.net, f=2, patch=4)
    moments = in_patches(lambda x: stage.net.encode(Tensor(x)).asnumpy(), to_float(IMAGES[:5]), 4, 2, 1 / 2)
    np.testing.assert_allclose(patched.moments(IMAGES[:5]), moments, atol=1e-5)
    images = in_patches(lambda z: stage.net.decode(Tensor(z)).asnumpy(), moments[:, :2], 2, 1, 2)
    np.testing.assert_allclose(patched.reconstruct(IMAGES[:5]), images, atol=1e-5)


def test_cached_moments(stage, tmp_path, monkeypatch):
    """The file is for these images, weights and patches only; a corrupt one is computed again."""
    found = stage.cached_moments(IMAGES, tmp_path)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(FirstStage, "moments", lambda *_: pytest.fail("computed again"))
        np.testing.assert_array_equal(stage.cached_moments(IMAGES, tmp_path), found)
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    np.testing.assert_array_equal(stage.cached_moments(IMAGES, tmp_path), found)
    assert file.read_bytes() == whole
    monkeypatch.setattr(FirstStage, "moments", lambda _, images: found[: len(images)])
    for other, images in (
        (stage, IMAGES[:12]),
        (FirstStage(CONFIG.build(1), f=2), IMAGES),
        (FirstStage(stage.net, f=2, patch=4), IMAGES),
    ):
        other.cached_moments(images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_codebook(tmp_path, monkeypatch):
    """Latents are the vectors before quantization, which the decoder quantizes, and so do a sampler's steps."""
    monkeypatch.setattr(latent, "PIXELS", 8 * 8 * 5)
    net = CODEBOOK.build(1)
    table = np.random.default_rng(2).standard_normal((7, 2)).astype(np.float32)
    net.quantize.embedding.weight.set_data(Tensor(table))
    stage = FirstStage(net, scale=2.5, f=2)
    z = stage.cached_moments(IMAGES, tmp_path)
    np.testing.assert_allclose(z, net.encode(Tensor(to_float(IMAGES))).asnumpy(), atol=1e-5)
    assert z.shape == (13, 2, 4, 4) and stage.has_codebook
    z = 2 * np.random.default_rng(3).standard_normal(z.shape).astype(np.float32)
    ids = ((z.transpose(0, 2, 3, 1)[..., None, :] - table) ** 2).sum(-1).argmin(-1)
    entries = table[ids].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(stage.codebook_ids(2.5 * z), ids)
    np.testing.assert_allclose(stage.quantize(Tensor(2.5 * z)).asnumpy(), 2.5 * entries, rtol=1e-5)
    expected = net.decode_latent(Tensor(entries)).asnumpy()
    np.testing.assert_allclose(stage.decode(2.5 * z), expected, atol=1e-5)
    np.testing.assert_allclose(stage.decode_ids(ids), expected, atol=1e-5)
    np.testing.assert_allclose(stage.reconstruct(IMAGES), net(Tensor(to_float(IMAGES)))[0].asnumpy(), atol=1e-5)


# Patches


def larger(x):
    return x.repeat(2, 2).repeat(2, 3)


def smaller(x):
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([1, 2, 0.5]),
    st.integers(1, 3),
)
def test_a_local_function_is_the_same_in_patches(half, apart, extra_h, extra_w, factor, channels):
    size, stride = 2 * half, 2 * min(apart, half)
    shape = (2, channels, size + 2 * extra_h, size + 2 * extra_w)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    fn = {1: np.negative, 2: larger, 0.5: smaller}[factor]
    seen = []

    def watched(patch):
        seen.append(patch.shape)
        return fn(patch)

    np.testing.assert_allclose(in_patches(watched, x, size, stride, factor), fn(x), rtol=1e-5, atol=1e-5)
    assert set(seen) == {(2, channels, size, size)}


def test_a_patch_counts_less_towards_its_border():
    """Two patches with the values 0 and 1 are blended linearly where they overlap."""
    answers = iter((0, 1))
    line = in_patches(lambda x: np.full_like(x, next(answers)), np.zeros((1, 1, 8, 12), np.float32), 8, 4, 1)[0, 0]
    assert (line[:, :4] == 0).all() and (line[:, 8:] == 1).all()
    np.testing.assert_allclose(line[3, 4:8], [1 / 5, 2 / 5, 3 / 5, 4 / 5], rtol=1e-6)


@pytest.mark.parametrize(
    "size, stride, factor, words",
    [(9, 2, 1, "do not fit 8 x 8"), (4, 0, 1, "do not fit"), (4, 5, 1, "do not fit"), (4, 1, 0.5, "are not whole")],
)
def test_patches_that_do_not_fit(size, stride, factor, words):
    with pytest.raises(ValueError, match=words):
        in_patches(lambda x: x, np.zeros((1, 1, 8, 8), np.float32), size, stride, factor)
