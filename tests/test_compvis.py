"""Configuration files of CompVis latent-diffusion: the run that each describes, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import ms_diffusion as md
from ms_diffusion.commands import train as train_command
from ms_diffusion.models.autoencoder import AutoencoderConfig, VQConfig
from ms_diffusion.models.context import LatentUnetConfig
from ms_diffusion.process import DiffusionConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.compvis import from_compvis
from ms_diffusion.training.config import config_from_record
from ms_diffusion.training.tasks.autoencoder import AutoencoderRunConfig
from ms_diffusion.training.tasks.latents import LatentConfig

pytest.importorskip("yaml")

KL = """
model:
  base_learning_rate: 4.5e-6
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: "val/rec_loss"
    embed_dim: 5
    lossconfig:
      target: ldm.modules.losses.LPIPSWithDiscriminator
      params: {disc_start: 7, kl_weight: 1e-6, disc_weight: 0.5}
    ddconfig: {double_z: true, z_channels: 6, resolution: 64, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2, 4],
      num_res_blocks: 2, attn_resolutions: [16], dropout: 0.1, attn_type: none}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 12, train: {target: some.data.Set}}
lightning:
  trainer: {benchmark: true}
"""
VQ_STAGE = """
      target: ldm.models.autoencoder.VQModelInterface
      params:
        embed_dim: 3
        n_embed: 64
        ckpt_path: no/such/file.ckpt
        ddconfig: {double_z: false, z_channels: 3, resolution: 32, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2],
          num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
"""
VQ = """
model:
  target: ldm.models.autoencoder.VQModel
  params:
    embed_dim: 4
    n_embed: 256
    ddconfig: {double_z: false, z_channels: 4, resolution: 64, in_channels: 3, out_ch: 3, ch: 64, ch_mult: [1, 2],
      num_res_blocks: 1, attn_resolutions: [32], dropout: 0.0}
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_conditional: false, disc_in_channels: 3, disc_num_layers: 2, disc_start: 1, disc_weight: 0.6,
        codebook_weight: 2.0}
"""
LATENT = f"""
model:
  base_learning_rate: 2.0e-06
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: image
    image_size: 16
    channels: 3
    monitor: val/loss_simple_ema
    EXTRA: null
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 16
        in_channels: 3
        out_channels: 3
        model_channels: 32
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 2]
        num_head_channels: 32
    first_stage_config: {VQ_STAGE}
    cond_stage_config: __is_unconditional__
data:
  params: {{batch_size: 48}}
"""
TRANSFORMER = "num_head_channels: 32\n        use_spatial_transformer: true\n        context_dim: 24"
BY_CLASS = """
      target: ldm.modules.encoders.modules.ClassEmbedder
      params: {embed_dim: 24, key: class_label, n_classes: 1001}"""
BY_TEXT = """
      target: ldm.modules.encoders.modules.BERTEmbedder
      params: {n_embed: 24, n_layer: 2}"""


def latent(extra: str = "", condition: str = "__is_unconditional__") -> str:
    text = LATENT.replace("    EXTRA: null\n", f"    {extra}\n" if extra else "")
    if condition != "__is_unconditional__":
        text = text.replace("__is_unconditional__", condition).replace("num_head_channels: 32", TRANSFORMER)
    return text


@pytest.fixture
def read(tmp_path):
    def read(text: str, *args):
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return from_compvis(path, *args)

    return read


def test_an_autoencoder(read):
    config = read(KL)
    assert isinstance(config, AutoencoderRunConfig)
    assert config.model == AutoencoderConfig(
        ch=32,
        ch_mult=(1, 2, 4),
        attn_resolutions=(16,),
        dropout=0.1,
        resolution=64,
        z_channels=6,
        embed_dim=5,
        attention="none",
    )
    train = config.train
    assert train.lr == train.disc_lr == pytest.approx(12 * 4.5e-6) and train.batch_size == 12 and not train.lr_decay
    assert (train.kl_weight, train.disc_start, train.disc_weight) == (1e-6, 7, 0.5)
    assert (train.disc_layers, train.disc_channels, train.adam_betas) == (3, 64, (0.5, 0.9))
    assert (config.data.name, config.data.size, config.data.flip) == ("image-folder", 64, False)


def test_a_vq_model(read):
    config = read(VQ)
    assert config.model == VQConfig(
        ch=64,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(32,),
        resolution=64,
        z_channels=4,
        embed_dim=4,
        n_embed=256,
    )
    assert (config.train.codebook_weight, config.train.disc_layers, config.train.disc_weight) == (2.0, 2, 0.6)


def test_a_latent_diffusion_with_its_first_stage(read):
    config = read(latent())
    assert isinstance(config, LatentConfig)
    assert config.first_stage_model == VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, n_embed=64)
    assert config.model == LatentUnetConfig(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        num_head_channels=32,
        channels=3,
        latent_size=16,
        condition="none",
        num_classes=None,
        context_dim=None,
    )
    assert config.diffusion == DiffusionConfig(schedule="sqrt_linear", beta_start=0.0015, beta_end=0.0195, loss="l2")
    assert (config.data.size, config.latent_scale, config.first_stage, config.init_from) == (32, 1.0, None, None)
    assert config.train.lr == pytest.approx(48 * 2e-6) and config.train.ema_decay == 0.9999
    assert not config.init_ema and read(latent(), True).init_ema
    config.check()


def test_the_betas_are_those_of_the_original_at_any_number_of_timesteps(read):
    for T in (1000, 2000):
        built = read(latent().replace("timesteps: 1000", f"timesteps: {T}")).diffusion.build(False)
        expected = np.linspace(0.0015**0.5, 0.0195**0.5, T) ** 2
        np.testing.assert_allclose(built.betas, expected, rtol=1e-12)
    linear = read(latent("beta_schedule: sqrt_linear")).diffusion.build(False)
    np.testing.assert_allclose(linear.betas, np.linspace(0.0015, 0.0195, 1000), rtol=1e-12)


def test_a_schedule_without_a_range_has_no_ends():
    with pytest.raises(ValueError, match="the schedule cosine has no beta_end: leave it out"):
        DiffusionConfig(schedule="cosine", beta_end=0.01).build()


def test_images_that_are_concatenated(read):
    """An image of the latents' size, or one that the first stage encodes, with a mask."""
    for stage, kind, channels in (("{target: torch.nn.Identity}", "lowres", 3), ("__is_first_stage__", "mask", 4)):
        text = latent("concat_mode: true").replace("__is_unconditional__", stage)
        config = read(text.replace("in_channels: 3\n        out", f"in_channels: {3 + channels}\n        out"))
        assert (config.data.condition, config.data.lowres_size) == (kind, 16)
        assert (config.model.in_channels, config.model.cond_channels) == (3, channels)
        config.check()
        with pytest.raises(UserError, match=f"in_channels is 3: here it can only be {3 + channels}"):
            read(text)


def test_options_of_a_process_and_a_schedule(read):
    scheduler = "{target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [10000], f_max: [1.]}}"
    extra = f"scale_by_std: true\n    loss_type: l1\n    use_ema: false\n    scheduler_config: {scheduler}"
    config = read(latent(extra), True)
    assert config.latent_scale is None and config.diffusion.loss == "l1" and not config.init_ema
    assert (config.train.warmup_steps, config.train.lr_decay, config.train.ema_decay) == (10000, False, 0.0)
    assert read(latent("scale_factor: 0.18215")).latent_scale == 0.18215


def test_conditions(read):
    key = "conditioning_key: crossattn"
    config = read(latent(key, BY_CLASS))
    model = config.model
    assert (model.condition, model.num_classes, model.null_class, model.context_dim) == ("class", 1000, True, 24)
    assert config.train.label_dropout == 0.1
    plain = read(latent(key, BY_CLASS.replace(", n_classes: 1001", "")))
    assert (plain.model.num_classes, plain.model.null_class, plain.train.label_dropout) == (1000, False, 0.0)
    model = read(latent("concat_mode: false", BY_TEXT)).model
    assert (model.condition, model.text_depth, model.vocab_size, model.max_length) == ("bert", 2, 30522, 77)
    assert not model.legacy or model.heads(64) == (2, 32)


def test_a_configuration_survives_its_run(read):
    for text in (KL, VQ, latent(), latent("conditioning_key: crossattn", BY_TEXT)):
        config = read(text)
        assert config_from_record(json.loads(json.dumps(config.to_record()))) == config


def test_weights_beside_the_file(read, tmp_path):
    (tmp_path / "stage.ckpt").touch()
    (tmp_path / "whole.ckpt").touch()
    config = read(latent("ckpt_path: whole.ckpt").replace("no/such/file.ckpt", "stage.ckpt"))
    assert (config.init_from, config.first_stage) == (str(tmp_path / "whole.ckpt"), str(tmp_path / "stage.ckpt"))
    assert config.init_ema


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "my.Model", "model.target is 'my.Model', which is not known here"),
        ("openaimodel.UNetModel", "other.Net", "unet_config.target is 'ldm.modules.diffusionmodules.other.Net'"),
        ("EXTRA: null", "unheard_of: 3", "model.params.unheard_of is not known here"),
        ("num_head_channels: 32", "num_heads: 4\n        wings: 2", "unet_config.params.wings is not known here"),
        ("model_channels: 32", "model_channels: wide", "model_channels is 'wide': it must be a whole number"),
        ("        model_channels: 32\n", "", "model_channels"),
        ("EXTRA: null", "conditioning_key: hybrid\n    x: 1", "x is not known here"),
        ("n_embed: 64", "n_embed: 64\n        colors: 3", "first_stage_config.params.colors is not known here"),
        ("double_z: false", "double_z: true", "double_z is True: here it can only be False"),
        ("channels: 3\n    monitor", "channels: 4\n    monitor", "in_channels is 3: here it can only be 4"),
        ("EXTRA: null", "beta_schedule: sqrt", "beta_schedule is 'sqrt': choose one of"),
        ("EXTRA: null", "use_positional_encodings: true", "use_positional_encodings is True"),
        ("params: {batch_size: 48}", "params: {batch_size: many}", "batch_size is 'many': it must be a whole number"),
        ("model:", "modell:", "model is missing: complete the file"),
        ("model:", "- model:\n ", "is no YAML"),
    ],
)
def test_what_is_not_known_is_named_in_one_line(read, old, new, message):
    with pytest.raises(UserError, match=message) as e:
        read(swapped(old, new))
    assert "\n" not in str(e.value)


def swapped(old: str, new: str) -> str:
    text = LATENT if old == "EXTRA: null" else LATENT.replace("    EXTRA: null\n", "")
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("content", ["", "3", "a: [", "!!python/object:os.system {}", "\x00", "&a [*a]"])
def test_files_that_are_no_configuration(read, content):
    with pytest.raises(UserError) as e:
        read(content)
    assert "\n" not in str(e.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no.yaml cannot be read"):
        from_compvis(tmp_path / "no.yaml")


def test_the_command_takes_the_file_as_a_preset(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(latent())
    args = train_command.parse_args(["--config", str(path), "--train.lr", "3e-4", "--init-from", "weights.ckpt"])
    assert args.config.train.lr == 3e-4 and args.config.init_ema and args.config.init_from == "weights.ckpt"
    assert args.config.first_stage_model is not None and args.yaml == str(path)
    with pytest.raises(UserError, match="is in place of a preset"):
        train_command.parse_args(["--config", str(path), "--preset", "latent"])


@pytest.mark.slow
def test_a_run_from_the_weights_of_a_whole_latent_diffusion(tmp_path, monkeypatch):
    """No pictures, no other run: the networks are those of the file, under CompVis's names, with the moving averages."""
    import safetensors.numpy

    from ms_diffusion.models.autoencoder import VQModel
    from ms_diffusion.models.context import LatentUnet

    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(latent("conditioning_key: crossattn\n    scale_by_std: true", BY_CLASS))
    config = from_compvis("tiny.yaml")
    rng, weights = np.random.default_rng(0), {"scale_factor": np.float32(0.7), "model_ema.decay": np.float32(0.9999)}
    places = {"unet.": "model.diffusion_model.", "cond_stage.": "cond_stage_model."}
    for p in LatentUnet(config.model).get_parameters():
        values = (rng.standard_normal(p.shape) * 0.05).astype(np.float32)
        place = next(place for place in places if p.name.startswith(place))
        name = places[place] + p.name.removeprefix(place)
        weights[name] = values
        if place == "unet.":
            averaged = "model_ema." + name.removeprefix("model.").replace(".", "")
            weights[averaged] = (rng.standard_normal(p.shape) * 0.05).astype(np.float32)
    for p in VQModel(config.first_stage_model).get_parameters():
        weights[f"first_stage_model.{p.name}"] = (rng.standard_normal(p.shape) * 0.05).astype(np.float32)
    safetensors.numpy.save_file({name: np.atleast_1d(a) for name, a in weights.items()}, "whole.safetensors")
    argv = [
        "--config",
        "tiny.yaml",
        "--init-from",
        "whole.safetensors",
        "--train.total-steps",
        "0",
        "--train.sample-num",
        "1",
    ]
    assert train_command.main([*argv, "--train.sample-steps", "1", "--run-dir", "run"]) == 0
    run = md.load("run")
    assert run.task.first_stage.scale == pytest.approx(0.7)
    unet = next(p for p in run.net.get_parameters() if p.name == "unet.input_blocks.0.0.weight")
    np.testing.assert_array_equal(unet.asnumpy(), weights["model_ema.diffusion_modelinput_blocks00weight"])
    table = next(p for p in run.net.get_parameters() if p.name == "cond_stage.embedding.weight")
    np.testing.assert_array_equal(table.asnumpy(), weights["cond_stage_model.embedding.weight"])
    codebook = run.task.first_stage.net.quantize.embedding.weight.asnumpy()
    np.testing.assert_array_equal(codebook, weights["first_stage_model.quantize.embedding.weight"])
    assert run.sample(1, steps=1, labels=999, guidance=2.0).shape == (1, 32, 32, 3)
