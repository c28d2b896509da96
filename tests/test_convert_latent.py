"""Weights of latent diffusion, as CompVis and diffusers name them, loaded into our networks."""

import dataclasses
import functools

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import draw_weights, uniform

from mindspore import Tensor

from ms_diffusion.convert import load_pretrained, save_torch_state_dict
from ms_diffusion.models.autoencoder import AutoencoderConfig
from ms_diffusion.models.context import LatentUnetConfig
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.models.unet_ldm import UNetModelConfig
from ms_diffusion.runtime import UserError, compiled

UNET = dict(
    in_channels=2,
    model_channels=8,
    out_channels=2,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_head_channels=4,
    context_dim=6,
    groups=4,
)
AUTOENCODER = AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, resolution=8, z_channels=3, embed_dim=2, groups=4)
CONFIGS = {
    "autoencoder": AUTOENCODER,
    "unet": UNetModelConfig(**UNET, use_spatial_transformer=True),
    "latent unet": LatentUnetConfig(**UNET, num_classes=3),
}


def values(net) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


@functools.cache
def shapes_of(kind) -> dict[str, tuple]:
    return {p.name: p.shape for p in CONFIGS[kind].build().get_parameters()}


def drawn(kind, sign=1) -> dict[str, np.ndarray]:
    """Weights of a network, none 0, and others by another sign or size."""
    return {name: sign * value for name, value in draw_weights(shapes_of(kind)).items()}


def prefixed(prefix, weights) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in weights.items()}


def write(path, arrays):
    """As .safetensors, or by PyTorch as Lightning does."""
    arrays = {name: np.array(a, order="C") for name, a in arrays.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        torch = pytest.importorskip("torch")
        state = {name: torch.from_numpy(a) for name, a in arrays.items()}
        torch.save({"state_dict": state, "global_step": 7, "pytorch-lightning_version": "1.4.2"}, path)
    return path


def complaint(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# CompVis: the weights of our own networks under the names of a LatentDiffusion

EXTRAS = {
    "betas": np.zeros(5, np.float32),
    "alphas_cumprod": np.zeros(5, np.float32),
    "logvar": np.zeros(5, np.float32),
    "scale_factor": np.float32(0.18215),
    "model_ema.decay": np.float32(0.9999),
    "model_ema.num_updates": np.array(3, np.int32),
    "first_stage_model.loss.logvar": np.float32(0),
    "first_stage_model.loss.discriminator.main.2.num_batches_tracked": np.array(3),
}
CLASSES = {"embedding.weight": uniform([9], (4, 6)).astype(np.float32)}


def averaged(weights) -> dict[str, np.ndarray]:
    """LitEma's names of the averages of these."""
    return {"model_ema." + name.replace(".", ""): value for name, value in weights.items()}


@functools.cache
def latent_diffusion() -> dict[str, np.ndarray]:
    """The U-Net's moving averages have the other sign."""
    return {
        **prefixed("model.diffusion_model.", drawn("unet")),
        **averaged(prefixed("diffusion_model.", drawn("unet", -1))),
        **prefixed("first_stage_model.", drawn("autoencoder")),
        **prefixed("cond_stage_model.", CLASSES),
        **EXTRAS,
    }


@functools.cache
def net_of(kind):
    return CONFIGS[kind].build()


def fresh(kind):
    """A network whose weights are all 0.5."""
    net = net_of(kind)
    for p in net.get_parameters():
        p.set_data(Tensor(np.full(p.shape, 0.5, np.float32)))
    return net


@pytest.fixture(scope="module", params=[".safetensors", ".ckpt"])
def checkpoint(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("compvis") / f"model{request.param}", latent_diffusion())


def latent_unet_weights(sign=1) -> dict[str, np.ndarray]:
    return prefixed("unet.", drawn("unet", sign)) | prefixed("cond_stage.", CLASSES)


PARTS = [
    ("autoencoder", False, lambda: drawn("autoencoder")),
    ("unet", False, lambda: drawn("unet")),
    ("unet", True, lambda: drawn("unet", -1)),
    ("latent unet", False, latent_unet_weights),
    ("latent unet", True, lambda: latent_unet_weights(-1)),  # the condition's weights have no moving average
]


@pytest.mark.parametrize(("kind", "ema", "expected"), PARTS)
def test_each_network_takes_its_part_of_a_latent_diffusion(kind, ema, expected, checkpoint):
    net = fresh(kind)
    report = load_pretrained(net, checkpoint, ema=ema)
    assert_same(values(net), expected())
    assert sorted(report.loaded) == sorted(values(net))
    assert not (report.reshaped or report.missing or report.unexpected or report.misfit)
    assert report.scale_factor == np.float32(0.18215)
    assert str(report) == f"{len(expected())} parameters loaded; scale_factor: 0.18215"


def test_a_part_by_its_name(tmp_path):
    path = write(tmp_path / "a.safetensors", latent_diffusion() | prefixed("teacher.", drawn("unet", -2)))
    net = fresh("latent unet")
    report = load_pretrained(net.cond_stage, path, part="cond_stage_model")
    assert report.loaded == ["cond_stage.embedding.weight"]
    np.testing.assert_array_equal(net.cond_stage.embedding.weight.asnumpy(), CLASSES["embedding.weight"])
    load_pretrained(fresh("unet"), path, part="model.diffusion_model", ema=True)
    assert_same(values(net_of("unet")), drawn("unet", -1))
    load_pretrained(net_of("unet"), path, part="teacher")
    assert_same(values(net_of("unet")), drawn("unet", -2))
    mine = fresh("latent unet")
    save_torch_state_dict(mine, tmp_path / "b.safetensors")
    load_pretrained(net_of("unet"), tmp_path / "b.safetensors", part="unet")
    assert all((value == 0.5).all() for value in values(net_of("unet")).values())
    assert "missing: " in complaint(fresh("unet"), path, part="model.diffusion")


def test_networks_alone(tmp_path):
    for kind in CONFIGS:
        load_pretrained(fresh(kind), write(tmp_path / f"{kind}.safetensors", drawn(kind)))
        assert_same(values(net_of(kind)), drawn(kind))


def test_a_unet_alone_is_the_latent_unets(tmp_path):
    path = write(tmp_path / "a.safetensors", drawn("unet"))
    report = load_pretrained(fresh("latent unet"), path, partial=True)
    assert report.missing == ["cond_stage.embedding.weight"] and len(report.loaded) == len(drawn("unet"))
    found = values(net_of("latent unet"))
    assert (found.pop("cond_stage.embedding.weight") == 0.5).all()
    assert_same(found, prefixed("unet.", drawn("unet")))


def test_an_unconditional_latent_unet_ignores_the_condition_of_the_file(tmp_path):
    net = LatentUnetConfig(**UNET | dict(context_dim=None), condition="none", num_classes=None).build()
    weights = draw_weights({p.name: p.shape for p in net.get_parameters()})
    of_unet = {name.removeprefix("unet."): value for name, value in weights.items()}
    arrays = prefixed("model.diffusion_model.", of_unet) | prefixed("cond_stage_model.", CLASSES)
    load_pretrained(net, write(tmp_path / "a.safetensors", arrays))
    assert_same(values(net), weights)


@pytest.mark.parametrize("ema", [False, True])
def test_an_autoencoder_with_its_loss(tmp_path, ema):
    weights = drawn("autoencoder")
    loss = {"loss.logvar": np.float32(0), "loss.perceptual_loss.lin0.weight": np.ones(3, np.float32)}
    batches = {"loss.discriminator.main.3.num_batches_tracked": np.array(4), "encoder.norm.num_batches_tracked": np.array(4)}
    averages = averaged(drawn("autoencoder", -1) | loss) | {"model_ema.decay": np.float32(1)}
    report = load_pretrained(fresh("autoencoder"), write(tmp_path / "a.ckpt", weights | loss | batches | averages), ema=ema)
    assert_same(values(net_of("autoencoder")), drawn("autoencoder", -1 if ema else 1))
    assert report.scale_factor is None


def test_moving_averages_alone(tmp_path):
    """Weights without an average are loaded as they are; unknown averages keep their names."""
    averages = averaged(prefixed("diffusion_model.", drawn("unet", -1)))
    frozen = "model.diffusion_model.out.2.bias"
    del averages["model_ema.diffusion_modelout2bias"]
    arrays = averages | {frozen: drawn("unet")["out.2.bias"]}
    load_pretrained(fresh("unet"), write(tmp_path / "a.safetensors", arrays), ema=True)
    assert_same(values(net_of("unet")), drawn("unet", -1) | {"out.2.bias": drawn("unet")["out.2.bias"]})
    path = write(tmp_path / "b.safetensors", arrays | {"model_ema.diffusion_modelextraweight": np.ones(2, np.float32)})
    assert "unexpected: model_ema.diffusion_modelextraweight)" in complaint(fresh("unet"), path, ema=True)


def test_no_moving_averages_of_this_network(tmp_path):
    path = write(tmp_path / "a.safetensors", latent_diffusion())
    message = "contains no moving averages of this network: load its weights without ema"
    assert message in complaint(fresh("autoencoder"), path, ema=True)
    assert message in complaint(fresh("unet"), write(tmp_path / "b.safetensors", drawn("unet")), ema=True)
    assert all((value == 0.5).all() for value in values(net_of("unet")).values())


# What wraps a network: prefixes of its names, and files of trainers

COUNTERS = {"step": np.array(7), "initted": np.array(True), "n_averaged": np.array(3)}
WRAPPED = {
    "compiled": lambda: prefixed("_orig_mod.", drawn("unet")),
    "parallel": lambda: prefixed("module.", drawn("unet")) | {"n_averaged": np.array(3)},
    "both": lambda: prefixed("module._orig_mod.", drawn("unet")),
    "inside": lambda: prefixed("model.module.", drawn("unet")) | {"criterion.weight": np.ones(3, np.float32)},
    "lightning": lambda: prefixed("net._orig_mod.", drawn("unet")) | prefixed("vgg.", drawn("autoencoder")),
    "deep": lambda: prefixed("a.b.c.d.", drawn("unet")),
    "averages": lambda: prefixed("online_model.", drawn("unet", -1)) | prefixed("ema_model.", drawn("unet")) | COUNTERS,
    "with averages": lambda: drawn("unet", -1) | prefixed("ema.module.", drawn("unet")),
    "latent diffusion": lambda: prefixed("module._orig_mod.", latent_diffusion()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_prefixes(name, tmp_path):
    report = load_pretrained(fresh("unet"), write(tmp_path / "a.safetensors", WRAPPED[name]()))
    assert_same(values(net_of("unet")), drawn("unet"))
    assert not report.unexpected and ("(moving averages)" in str(report)) == ("averages" in name)


def test_names_in_messages_are_the_files(tmp_path):
    arrays = prefixed("module.", drawn("unet") | {"extra": np.ones(2, np.float32)})
    path = write(tmp_path / "a.safetensors", arrays)
    assert "unexpected: module.extra)" in complaint(fresh("unet"), path)
    assert not load_pretrained(fresh("unet"), path, ignore_keys="module.extra").unexpected
    both = drawn("unet") | {f"module.{name}": value for name, value in drawn("unet", -1).items()}  # one of two models
    load_pretrained(fresh("unet"), write(tmp_path / "b.safetensors", both), ignore_keys="module.")
    assert_same(values(net_of("unet")), drawn("unet"))
    assert "unexpected: module." in complaint(fresh("unet"), tmp_path / "b.safetensors")


def test_files_of_trainers(tmp_path):
    """As of denoising_diffusion_pytorch and Lightning, each with the states of what trains the network."""
    torch = pytest.importorskip("torch")

    def tensors(arrays):
        return {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}

    layer = torch.nn.Linear(2, 3)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    diffusion = {"betas": np.zeros(5), "sqrt_alphas_cumprod": np.zeros(5)}
    raw, averaged = (prefixed("model.", drawn("unet", sign)) | diffusion for sign in (-1, 1))
    ema = prefixed("online_model.", raw) | prefixed("ema_model.", averaged) | COUNTERS
    beside = {"step": 7, "opt": adam.state_dict(), "scaler": {"scale": 2.0, "_growth_tracker": 0}, "version": "2.2.5"}
    contents = [
        {"model": tensors(raw), "ema": tensors(ema), **beside},
        {"model": tensors(raw), "ema": tensors(averaged), **beside},  # older ones
        {"net": tensors(drawn("unet", -1)), "ema_state_dict": tensors(drawn("unet")), **beside},
    ]
    for content in contents:
        torch.save(content, tmp_path / "model-1.pt")
        report = load_pretrained(fresh("unet"), tmp_path / "model-1.pt")
        assert_same(values(net_of("unet")), drawn("unet"))
        assert report.prefix.startswith("ema") and "(moving averages)" in str(report)
        load_pretrained(fresh("unet"), tmp_path / "model-1.pt", ema=True)
        load_pretrained(net_of("unet"), tmp_path / "model-1.pt", ignore_keys="ema")
        assert_same(values(net_of("unet")), drawn("unet", -1))
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "a.ckpt"}}
    lightning = {"epoch": 3, "global_step": 70, "optimizer_states": [adam.state_dict()], "callbacks": callbacks}
    torch.save({**lightning, "state_dict": tensors(raw)}, tmp_path / "a.ckpt")
    assert load_pretrained(fresh("unet"), tmp_path / "a.ckpt").prefix == "model."
    assert_same(values(net_of("unet")), drawn("unet", -1))


def test_wrappers_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.optim import swa_utils

    from benchmarks.torch_peer import Unet as Twin

    twin, net = Twin(8, dim_mults=(1,)), UnetConfig(dim=8, dim_mults=(1,)).build()
    expected = {name: value.numpy() for name, value in twin.state_dict().items()}
    for wrapped in (torch.compile(twin, backend="eager"), torch.nn.DataParallel(twin), swa_utils.AveragedModel(twin)):
        torch.save(wrapped.state_dict(), tmp_path / "net.pt")
        for p in net.get_parameters():
            p.set_data(Tensor(np.full(p.shape, 0.5, np.float32)))
        load_pretrained(net, tmp_path / "net.pt")
        assert_same(values(net), expected)


# What does not fit


def misfits() -> dict[str, np.ndarray]:
    """A LatentDiffusion whose U-Net lacks one weight, has one too many, one linear, and three of other shapes."""
    arrays, start = dict(latent_diffusion()), "model.diffusion_model."
    del arrays[start + "out.0.bias"]
    arrays[start + "extra.weight"] = np.ones(3, np.float32)
    arrays[start + "middle_block.1.proj_in.weight"] = arrays[start + "middle_block.1.proj_in.weight"][:, :, 0, 0]
    arrays[start + "input_blocks.0.0.weight"] = np.ones((8, 3, 3, 3), np.float32)
    arrays[start + "input_blocks.3.0.skip_connection.weight"] = np.ones((16, 7), np.float32)
    arrays[start + "out.2.bias"] = arrays[start + "out.2.bias"][:, None]  # ones alone, but a bias has no second axis
    return arrays


def test_partial_loads_what_fits_and_reports_the_rest(tmp_path):
    path = write(tmp_path / "a.safetensors", misfits())
    report = load_pretrained(fresh("unet"), path, partial=True)
    left = {"out.0.bias", "input_blocks.0.0.weight", "input_blocks.3.0.skip_connection.weight", "out.2.bias"}
    expected = {name: np.full_like(a, 0.5) if name in left else a for name, a in drawn("unet").items()}
    assert_same(values(net_of("unet")), expected)
    assert sorted(report.loaded) == sorted(expected.keys() - left)
    assert report.missing == ["out.0.bias"]
    assert report.unexpected == ["model.diffusion_model.extra.weight"]
    assert report.reshaped == ["middle_block.1.proj_in.weight"]
    assert sorted(report.misfit) == [
        "input_blocks.0.0.weight (8, 3, 3, 3) instead of (8, 2, 3, 3)",
        "input_blocks.3.0.skip_connection.weight (16, 7) instead of (16, 8, 1, 1)",
        "out.2.bias (2, 1) instead of (2,)",
    ]
    assert str(report) == (
        f"{len(report.loaded)} parameters loaded; reshaped: middle_block.1.proj_in.weight; not in the file, unchanged: "
        f"out.0.bias; of another shape, unchanged: {', '.join(report.misfit)}; only in the file: "
        "model.diffusion_model.extra.weight; scale_factor: 0.18215"
    )


def test_all_or_nothing(tmp_path):
    path = write(tmp_path / "a.safetensors", misfits())
    message = complaint(fresh("unet"), path)
    assert all((value == 0.5).all() for value in values(net_of("unet")).values())
    assert "missing: out.0.bias; unexpected: model.diffusion_model.extra.weight; other shape: " in message
    assert "input_blocks.0.0.weight (8, 3, 3, 3) instead of (8, 2, 3, 3)" in message
    assert f"build it with the options of {path}" in message and "by ignore_keys" in message and "by partial" in message
    assert not load_pretrained(fresh("autoencoder"), path).unexpected  # which is another's part


def test_nothing_fits(tmp_path):
    path = write(tmp_path / "a.safetensors", drawn("autoencoder"))
    assert "no weight fits this network (missing: " in complaint(fresh("unet"), path, partial=True)
    assert "missing: " in complaint(fresh("unet"), path)
    assert all((value == 0.5).all() for value in values(net_of("unet")).values())


def test_ignored_keys_are_the_files_own(tmp_path):
    arrays = latent_diffusion() | {"model.diffusion_model.extra.weight": np.ones(3, np.float32)}
    path = write(tmp_path / "a.safetensors", arrays)
    assert "unexpected: model.diffusion_model.extra.weight)" in complaint(fresh("unet"), path)
    for keys in ("model.diffusion_model.extra", ("nothing", "model.diffusion_model.ex")):
        assert not load_pretrained(fresh("unet"), path, ignore_keys=keys).unexpected
        assert_same(values(net_of("unet")), drawn("unet"))
    without_out = ("model.diffusion_model.extra", "model.diffusion_model.out.", "scale_factor")
    report = load_pretrained(fresh("unet"), path, ignore_keys=without_out, partial=True)
    assert report.missing == [name for name in shapes_of("unet") if name.startswith("out.")]
    assert len(report.missing) == 4 and report.scale_factor is None


def test_checkpoint_of_lightning_objects(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": [CONFIGS["unet"]]}, tmp_path / "a.ckpt")
    message = complaint(fresh("unet"), tmp_path / "a.ckpt")
    assert "or .safetensors" in message and "weights_only=False" in message


# diffusers: its networks, and its own reading of CompVis's names

of_diffusers = pytest.mark.filterwarnings("default")  # it warns as it is imported


def peer_of(name, **options):
    """A network of diffusers with weights drawn, none of them 0."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    peer = getattr(diffusers, name)(**options).eval()
    shapes = {name: tuple(value.shape) for name, value in peer.state_dict().items()}
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in draw_weights(shapes).items()})
    return peer


def arrays_of(peer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in peer.state_dict().items()}


def assert_close(ours, reference):
    reference = reference.detach().numpy()
    assert ours.shape == reference.shape
    assert abs(ours.asnumpy() - reference).max() < 1e-4 * abs(reference).max()


OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def in_old_spelling(name):
    return functools.reduce(lambda name, new: name.replace(new, OLD[new]), OLD, name)


@of_diffusers
def test_autoencoder_of_diffusers(tmp_path):
    peer = peer_of(
        "AutoencoderKL",
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16, 8),
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=4,
    )
    config = AutoencoderConfig(
        ch=8, ch_mult=(1, 2, 1), attn_resolutions=(8,), resolution=16, z_channels=3, embed_dim=3, groups=4
    )
    net, arrays = config.build(), arrays_of(peer)
    old = {in_old_spelling(name): value for name, value in arrays.items()}
    assert len(old.keys() - arrays.keys()) == 7 * 4 * 2
    load_pretrained(net, write(tmp_path / "old.safetensors", old))
    in_old = values(net)
    report = load_pretrained(net, write(tmp_path / "new.safetensors", arrays))
    assert_same(in_old, values(net))
    assert len(report.reshaped) == 7 * 4 and "encoder.mid.attn_1.q.weight" in report.reshaped
    x, z = uniform([1], (13, 3, 16, 16)).astype(np.float32), uniform([2], (1, 3, 4, 4)).astype(np.float32)
    torch = pytest.importorskip("torch")
    assert_close(net.encode(Tensor(x)), peer.encode(torch.from_numpy(x)).latent_dist.parameters)
    assert_close(net.decode(Tensor(z)), peer.decode(torch.from_numpy(z)).sample)


@functools.cache
def conditional():
    """A network of ours as the U-Net of diffusers, compiled before anything is loaded."""
    config = UNetModelConfig(
        **UNET | dict(num_res_blocks=2, attention_resolutions=(1,), num_classes=3, num_head_channels=None),
        num_heads=2,
        use_spatial_transformer=True,
    )
    net = config.build()

    def forward(x, t, context, y):
        return net(x, t, context, y)

    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, 2, 8, 8), np.float32), rng.standard_normal((2, 5, 6), np.float32)
    inputs = x, np.array([7, 900], np.int32), context, np.array([2, 0], np.int32)
    function = compiled(forward)
    assert not function(*map(Tensor, inputs)).asnumpy().any()
    return net, function, inputs


@of_diffusers
@pytest.mark.parametrize("linear", [False, True])
def test_unet_of_diffusers(linear, tmp_path):
    peer = peer_of(
        "UNet2DConditionModel",
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=6,
        attention_head_dim=2,  # which is the number of heads there
        norm_num_groups=4,
        num_class_embeds=3,
        use_linear_projection=linear,
    )
    net, function, inputs = conditional()
    report = load_pretrained(net, write(tmp_path / "a.safetensors", arrays_of(peer)))
    assert len(report.reshaped) == (2 * 6 if linear else 0)
    torch = pytest.importorskip("torch")
    x, t, context, y = map(torch.from_numpy, inputs)
    assert_close(function(*map(Tensor, inputs)), peer(x, t, context, class_labels=y.long()).sample)


ATTENTION = UNET | dict(num_res_blocks=2, context_dim=None, num_classes=3)
UPDOWN = dict(resblock_updown=True, use_scale_shift_norm=True, num_head_channels=None, num_heads=1)


@of_diffusers
@pytest.mark.parametrize("style", ["default", "ddpm", "updown"])
@pytest.mark.parametrize("new_order", [False, True])
def test_unet_with_attention_blocks_of_diffusers(style, new_order, tmp_path):
    """UNet2DModel, the network of diffusers' unconditional and class-conditional pipelines; also in its older spelling. ddpm
    has the settings of the weights of Ho et al. 2020."""
    updown = style == "updown"
    kind = "resnet" if updown else "conv"
    options = {"attn_norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift"} if updown else {}
    options |= dict(flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-2) if style == "ddpm" else {}
    own = dict(sines_first=True, pad_right=True, norm_eps=1e-2) if style == "ddpm" else {}
    peer = peer_of(
        "UNet2DModel",
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D" if updown else "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D" if updown else "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None if updown else 4,
        norm_num_groups=4,
        num_class_embeds=3,
        downsample_type=kind,
        upsample_type=kind,
        **options,
    )
    config = UNetModelConfig(**ATTENTION | own | (UPDOWN if updown else {}), use_new_attention_order=new_order)
    net, arrays = config.build(), arrays_of(peer)
    load_pretrained(net, write(tmp_path / "old.safetensors", {in_old_spelling(n): a for n, a in arrays.items()}))
    in_old = values(net)
    peer.save_pretrained(tmp_path / "unet")
    report = load_pretrained(net, tmp_path / "unet")
    assert_same(in_old, values(net))
    assert sorted(report.loaded) == sorted(in_old) and not report.unexpected
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, t, y = rng.standard_normal((13, 2, 8, 8), np.float32), rng.integers(0, 1000, 13), rng.integers(0, 3, 13)
    expected = peer(torch.from_numpy(x), torch.from_numpy(t), class_labels=torch.from_numpy(y)).sample
    assert_close(net(Tensor(x), Tensor(t.astype(np.int32)), None, Tensor(y.astype(np.int32))), expected)
    before, heads = values(net), 1 if style != "updown" else 2  # the shapes are the same
    for change in ({"num_head_channels": None, "num_heads": heads}, {"norm_eps": 0.1}, {"sines_first": style != "ddpm"}):
        other = dataclasses.replace(config, **change).build()
        assert "config.json" in complaint(other, tmp_path / "unet")
        assert load_pretrained(other, tmp_path / "unet", partial=True).loaded
    load_pretrained(net, tmp_path, partial=True)
    assert_same(values(net), before)
    part = {name: value for name, value in arrays.items() if not name.endswith("mid_block.attentions.0.to_k.bias")}
    message = complaint(net, write(tmp_path / "part.safetensors", part))
    assert "missing: middle_block.1.qkv.bias; unexpected: mid_block.attentions.0.to_q.bias, mid_block" in message


def file_of_diffusers(path, kind, weights, config):
    """These weights of CompVis as diffusers reads them."""
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, f"convert_ldm_{kind}_checkpoint")
    start = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[kind]
    return write(path, convert(prefixed(start, weights), config))


@of_diffusers
@settings(max_examples=6, deadline=None)
@given(
    channel_mult=st.sampled_from([(1,), (2, 1), (1, 2, 2)]),
    num_res_blocks=st.integers(1, 3),
    attention_resolutions=st.sets(st.sampled_from([1, 2, 4])).map(tuple),
    transformer_depth=st.integers(1, 2),
)
def test_names_of_a_unet_of_any_size(tmp_path_factory, **options):
    config = UNetModelConfig(**UNET | options, num_classes=3, use_spatial_transformer=True)
    net = config.build()
    weights = draw_weights({p.name: p.shape for p in net.get_parameters()})
    theirs = {"layers_per_block": config.num_res_blocks, "num_class_embeds": 3}
    path = file_of_diffusers(tmp_path_factory.mktemp("unet") / "a.safetensors", "unet", weights, theirs)
    load_pretrained(net, path)
    assert_same(values(net), weights)


@of_diffusers
@settings(max_examples=6, deadline=None)
@given(ch_mult=st.sampled_from([(1,), (2, 1), (1, 2, 2), (1, 1, 2, 2)]), num_res_blocks=st.integers(1, 3))
def test_names_of_an_autoencoder_of_any_size(tmp_path_factory, ch_mult, num_res_blocks):
    config = AutoencoderConfig(ch=8, ch_mult=ch_mult, num_res_blocks=num_res_blocks, resolution=16, groups=4)
    net = config.build()
    weights = draw_weights({p.name: p.shape for p in net.get_parameters()})
    theirs = {"down_block_types": ch_mult, "up_block_types": ch_mult}  # counted alone
    path = file_of_diffusers(tmp_path_factory.mktemp("vae") / "a.safetensors", "vae", weights, theirs)
    load_pretrained(net, path)
    assert_same(values(net), weights)
