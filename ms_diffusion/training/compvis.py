"""Configuration files of CompVis latent-diffusion (YAML) as configurations of our runs."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.conditions import condition_channels
from ..fields import check_fields, find_problem
from ..files import read_bytes
from ..models.autoencoder import AutoencoderConfig, VQConfig
from ..models.context import LatentUnetConfig
from ..process import DiffusionConfig
from ..runtime import UserError
from .config import Config, DataConfig, ImageTrainConfig
from .tasks.autoencoder import AutoencoderRunConfig, AutoencoderTrainConfig
from .tasks.latents import LatentConfig

REQUIRED = object()
NOT_CLIPPED = 1e9  # the largest norm of gradients where these are not scaled
SCHEDULES = {"linear": "sqrt_linear", "cosine": "cosine", "sqrt_linear": "unscaled_linear"}  # theirs -> ours
OF_LIGHTNING = ("monitor", "image_key", "first_stage_key", "log_every_t", "scheduler_config", "use_ema", "ckpt_path")
FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # such as 1e-6, which YAML 1.1 takes for text


class Section:
    """A part of the file, whose keys are taken one by one; `end` refuses those that nothing has taken."""

    def __init__(self, content: Any, path: str):
        if not isinstance(content, dict):
            raise UserError(f"{path} is {content!r:.100}: it must have keys and values")
        self.content, self.path = dict(content), path

    def take(self, key: str, default: Any = REQUIRED, kind: Any = Any) -> Any:
        if key not in self.content and default is REQUIRED:
            raise UserError(f"{self.path}.{key} is missing: complete the file")
        value = self.content.pop(key, default)
        if value is not default and (problem := find_problem(value, kind)):
            raise UserError(f"{self.path}.{key} is {value!r:.100}: {problem}")
        return value

    def section(self, key: str) -> "Section":
        return Section(self.take(key), f"{self.path}.{key}")

    def rename(self, names: dict[str, str], required: tuple[str, ...] = ()) -> dict[str, Any]:
        """Values of the keys that are there, by our names for them."""
        return {ours: self.take(theirs) for theirs, ours in names.items() if theirs in self.content or theirs in required}

    def only(self, **values: Any) -> None:
        """Refuse other values of these keys than ours."""
        for key, value in values.items():
            if (found := self.content.pop(key, value)) != value:
                raise UserError(f"{self.path}.{key} is {found!r:.100}: here it can only be {value!r}")

    def end(self, ignored: tuple[str, ...] = ()) -> None:
        if unknown := [key for key in self.content if key not in ignored]:
            raise UserError(f"{self.path}.{unknown[0]!s:.100} is not known here: remove it if it is not needed")

    def target(self, known: dict[str, Callable]) -> tuple[Callable, "Section"]:
        """What is known for the section's target, and its parameters."""
        name = self.take("target", kind=str)
        if name not in known:
            raise UserError(
                f"{self.path}.target is {name!r:.100}, which is not known here: choose one of {', '.join(known)}"
            )
        return known[name], Section(self.content.pop("params", {}), f"{self.path}.params")


def from_compvis(path: str | Path, init_ema: bool = False) -> Config:
    """The run that a configuration file of CompVis latent-diffusion describes: of an AutoencoderKL, a VQModel, or a
    LatentDiffusion with its first stage. The data set is an image folder that --data.dir names. A file of weights that is
    named there is taken if it exists. Raises UserError if the file cannot be read, or has a target or a key for which there
    is nothing here.

    Args:
        init_ema: Whether the moving averages will be taken of --init-from, in case the LatentDiffusion has some."""
    try:
        import yaml
    except ImportError as e:
        raise UserError(f"{path}: reading YAML needs PyYAML: pip install pyyaml") from e
    try:
        content = as_python(yaml.safe_load(read_bytes(path)))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise UserError(f"{path} is no YAML: {' '.join(str(e).split()):.200}") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    whole = Section(content, str(path))
    model, data = whole.section("model"), Section(whole.take("data", {}), f"{path}.data")
    data = Section(data.take("params", {}), f"{data.path}.params")
    read, params = model.target(RUNS)
    batch_size = data.take("batch_size", 1, int)
    # As main.py has it by default, for one device that accumulates no gradients
    lr = batch_size * model.take("base_learning_rate", 1e-6, float)
    config = read(params, batch_size, lr, Path(path).parent)
    model.end()
    averages = isinstance(config, LatentConfig) and config.train.ema_decay > 0
    return replace(config, init_ema=averages and (init_ema or config.init_from is not None))


def as_python(value: Any) -> Any:
    """Lists as tuples, and the numbers that YAML 1.1 takes for text."""
    if isinstance(value, dict):
        return {str(key): as_python(each) for key, each in value.items()}
    if isinstance(value, list):
        return tuple(map(as_python, value))
    return float(value) if isinstance(value, str) and FLOAT.fullmatch(value) else value


def checkpoint(section: Section, folder: Path) -> str | None:
    """The file of weights that the section names, if it is there, as the file says or beside it."""
    name = section.take("ckpt_path", None)
    places = [] if not isinstance(name, str) else [Path(name), folder / name]
    return next((str(place) for place in places if place.is_file()), None)


# First stages

DDCONFIG = {name: name for name in ("z_channels", "resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")}
DDCONFIG |= {"in_channels": "channels", "dropout": "dropout", "resamp_with_conv": "resamp_with_conv"}
DDCONFIG |= {"tanh_out": "tanh_out", "attn_type": "attention"}


def first_stage(section: Section, double_z: bool, kind: type[AutoencoderConfig], names: tuple[str, ...] = ()) -> Any:
    """The autoencoder; the first of its other `names` must be there. Defaults are those of the original's constructors."""
    dd = section.section("ddconfig")
    dd.only(double_z=double_z, give_pre_end=False)
    required = "ch", "in_channels", "num_res_blocks", "attn_resolutions", "resolution", "z_channels"
    values = {"embed_dim": section.take("embed_dim"), "ch_mult": (1, 2, 4, 8), **dd.rename(DDCONFIG, required)}
    values |= section.rename({name: name for name in names}, names[:1])
    out_channels = dd.take("out_ch", None)
    if dd.take("use_linear_attn", False):
        values["attention"] = "linear"
    dd.end()
    if out_channels != values.get("channels"):
        values["out_channels"] = out_channels
    section.only(colorize_nlabels=None, batch_resize_range=None, lr_g_factor=1.0, ignore_keys=())
    return checked(kind, values, section.path)


def checked(kind: type, values: dict[str, Any], path: str) -> Any:
    """`kind(**values)`, with values of the right types and ranges."""
    config = kind(**values)
    check_fields(config, f"{path}: ")
    return config


def kl_model(section: Section) -> AutoencoderConfig:
    return first_stage(section, True, AutoencoderConfig)


def vq_model(section: Section) -> VQConfig:
    return first_stage(section, False, VQConfig, ("n_embed", "remap", "sane_index_shape"))


LOSS = {"kl_weight": "kl_weight", "codebook_weight": "codebook_weight", "logvar_init": "logvar_init"}
LOSS |= {"pixelloss_weight": "pixel_weight", "perceptual_weight": "perceptual_weight", "disc_start": "disc_start"}
LOSS |= {"disc_weight": "disc_weight", "disc_factor": "disc_factor", "disc_loss": "disc_loss", "pixel_loss": "pixel_loss"}
LOSS |= {"disc_num_layers": "disc_layers", "disc_ndf": "disc_channels"}


def discriminated(section: Section) -> dict[str, Any]:
    """The training against a discriminator; what the original's constructor has by default is told here."""
    section.only(disc_conditional=False, perceptual_loss="lpips")
    section.end((*LOSS, "use_actnorm", "disc_in_channels", "n_classes"))
    norm = "act" if section.take("use_actnorm", False, bool) else "batch"
    default = {"kl_weight": 1.0, "disc_layers": 3, "disc_channels": 64, "disc_weight": 1.0, "disc_norm": norm}
    return default | section.rename(LOSS)


def no_loss(section: Section) -> dict[str, Any]:
    return {"disc_weight": 0.0, "perceptual_weight": 0.0}


LOSSES: dict[str, Callable[[Section], dict[str, Any]]] = {
    "ldm.modules.losses.LPIPSWithDiscriminator": discriminated,
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": discriminated,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": discriminated,
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": discriminated,
    "ldm.modules.losses.contperceptual.DummyLoss": no_loss,
    "taming.modules.losses.vqperceptual.DummyLoss": no_loss,
    "torch.nn.Identity": no_loss,
}


def autoencoder_run(read: Callable[[Section], AutoencoderConfig]) -> Callable[[Section, int, float, Path], Config]:
    def run(section: Section, batch_size: int, lr: float, folder: Path) -> Config:
        loss, params = section.section("lossconfig").target(LOSSES)
        init_from, model = checkpoint(section, folder), read(section)
        values = {"lr": lr, "disc_lr": lr, "batch_size": batch_size, "lr_decay": False, "warmup_steps": 0}
        values |= {"clip_norm": NOT_CLIPPED, "ema_decay": 0.0, "adam_betas": (0.5, 0.9), **loss(params)}
        section.end(OF_LIGHTNING)
        train = checked(AutoencoderTrainConfig, values, f"{section.path}.lossconfig.params")
        data = DataConfig("image-folder", size=model.resolution, flip=False)
        return AutoencoderRunConfig(data=data, model=model, train=train, init_from=init_from)

    return run


# Latent diffusion

FIRST_STAGES: dict[str, Callable[[Section], AutoencoderConfig]] = {
    "ldm.models.autoencoder.AutoencoderKL": kl_model,
    "ldm.models.autoencoder.VQModel": vq_model,
    "ldm.models.autoencoder.VQModelInterface": vq_model,
    "taming.models.vqgan.VQModel": vq_model,
}
UNET = {name: name for name in (
    "model_channels", "num_res_blocks", "attention_resolutions", "dropout", "channel_mult", "conv_resample",
    "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "use_spatial_transformer", "transformer_depth",
    "n_embed", "legacy", "use_checkpoint",
)} | {"use_checkpoint": "recompute"}  # fmt: skip
COUNTS = ("num_heads", "num_head_channels", "num_heads_upsample")  # of which -1 is None


def unet(section: Section) -> dict[str, Any]:
    section.only(dims=2, use_fp16=False)
    required = "model_channels", "num_res_blocks", "attention_resolutions"
    values = {"channel_mult": (1, 2, 4, 8), **section.rename(UNET, required)}
    values |= {name: None if (n := section.take(name, -1)) == -1 else n for name in COUNTS}
    context = section.take("context_dim", None)
    values["context_dim"] = context[0] if isinstance(context, tuple) and len(context) == 1 else context
    values |= {"num_classes": section.take("num_classes", None), "groups": 32}
    values |= {name: section.take(name) for name in ("in_channels", "out_channels", "image_size")}
    values.pop("use_spatial_transformer", None)  # as the condition has it
    section.end()
    return values


UNETS: dict[str, Callable[[Section], dict[str, Any]]] = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": unet}


def by_class(section: Section) -> dict[str, Any]:
    """1001 classes are ImageNet's 1000 and the one that stands for none."""
    width, classes = section.take("embed_dim", kind=int), section.take("n_classes", 1000, int)
    section.end(("key",))
    null = classes == 1001
    return {"condition": "class", "context_dim": width, "num_classes": classes - null, "null_class": null}


def by_text(section: Section) -> dict[str, Any]:
    section.only(use_tokenizer=True, embedding_dropout=0.0)
    width, depth = section.take("n_embed", kind=int), section.take("n_layer")
    size = {"vocab_size": section.take("vocab_size", 30522), "max_length": section.take("max_seq_len", 77)}
    section.end(("device",))
    return {"condition": "bert", "context_dim": width, "text_depth": depth, **size}


def by_rows(section: Section) -> dict[str, Any]:
    section.end()
    return {"condition": "context"}


CONDITIONS: dict[str, Callable[[Section], dict[str, Any]]] = {
    "ldm.modules.encoders.modules.ClassEmbedder": by_class,
    "ldm.modules.encoders.modules.BERTEmbedder": by_text,
    "torch.nn.Identity": by_rows,
}


# What is concatenated to latents, by the cond_stage_config: an image of their size, or an encoded image with a mask
CONCATENATED = {"torch.nn.Identity": "lowres", "__is_first_stage__": "mask"}


def condition(section: Section, key: str | None, network: dict[str, Any]) -> dict[str, Any]:
    """What the network is conditioned on by attention or its time embedding, for a conditioning_key."""
    content, where = section.take("cond_stage_config"), f"{section.path}.cond_stage_config"
    if content == "__is_unconditional__" or key == "adm":
        classes = network["num_classes"]
        return {"condition": "none"} if classes is None else {"condition": "adm", "null_class": False}
    if key == "concat":
        name = content.get("target") if isinstance(content, dict) else content
        if not isinstance(name, str) or name not in CONCATENATED:
            raise UserError(f"{where} is {name!r:.100}: for concat it can only be {' or '.join(CONCATENATED)}")
        return {"condition": "none", "concatenated": CONCATENATED[name]}
    if key != "crossattn":
        raise UserError(f"{section.path}.conditioning_key is {key!r:.100}: it can only be crossattn, concat or adm")
    read, params = Section(content, where).target(CONDITIONS)
    found = read(params)
    if found.get("context_dim", network["context_dim"]) != network["context_dim"]:
        raise UserError(
            f"{where} is {found['context_dim']} wide, the context {network['context_dim']}: they must be the same"
        )
    return found


def latent_run(section: Section, batch_size: int, lr: float, folder: Path) -> Config:
    read_network, network = section.section("unet_config").target(UNETS)
    values = read_network(network)
    key = section.take("conditioning_key", None) or ("concat" if section.take("concat_mode", True) else "crossattn")
    section.take("concat_mode", None)
    values |= condition(section, key, values)
    channels, size = section.take("channels", 3, int), section.take("image_size", 256, int)
    values.pop("image_size")
    shown = values.pop("concatenated", "none")

    stage = section.section("first_stage_config")
    read, params = stage.target(FIRST_STAGES)
    weights = checkpoint(params, folder)
    params.take("lossconfig", None)
    autoencoder = read(params)
    params.end(OF_LIGHTNING)
    values |= {"latent_size": size, "channels": autoencoder.channels}
    values["cond_channels"] = condition_channels(shown, autoencoder.channels, channels)
    if values["in_channels"] != channels + values["cond_channels"]:
        wanted = channels + values["cond_channels"]
        raise UserError(f"{network.path}.in_channels is {values['in_channels']}: here it can only be {wanted}")
    values["in_channels"] = channels
    model = checked(LatentUnetConfig, values, network.path)

    T = section.take("timesteps", 1000, int)
    schedule = section.take("beta_schedule", "linear", str)
    if schedule not in SCHEDULES:
        raise UserError(f"{section.path}.beta_schedule is {schedule!r:.100}: choose one of {', '.join(SCHEDULES)}")
    process = {"num_timesteps": T, "schedule": SCHEDULES[schedule], "objective": section.take("parameterization", "eps")}
    process |= {"loss": section.take("loss_type", "l2"), "v_posterior": section.take("v_posterior", 0.0)}
    process |= section.rename({name: name for name in ("original_elbo_weight", "l_simple_weight")})
    offset = section.take("cosine_s", 8e-3, float)
    ends = section.take("linear_start", 1e-4, float), section.take("linear_end", 2e-2, float)
    if schedule != "cosine":  # their schedules are not scaled with the number of timesteps, and sqrt_linear of ours is
        factor = T / 1000 if schedule == "linear" else 1
        process |= {"beta_start": factor * ends[0], "beta_end": factor * ends[1]}
    elif offset != 8e-3:
        process["cosine_s"] = offset

    scale = section.take("scale_factor", 1.0, float)
    by_std = section.take("scale_by_std", False, bool)
    ema = section.take("use_ema", True, bool)
    has_null = model.null_label is not None or model.condition in ("bert", "context")
    train = {"lr": lr, "batch_size": batch_size, "lr_decay": False, "warmup_steps": 0, "clip_norm": NOT_CLIPPED}
    train |= {"ema_decay": 0.9999 if ema else 0.0, "label_dropout": 0.1 if has_null else 0.0, "sample_num": 8}
    train |= section.rename({"learn_logvar": "learn_logvar"}) | warm_up(section)
    section.only(num_timesteps_cond=1, logvar_init=0.0, use_positional_encodings=False, cond_stage_forward=None)
    section.only(given_betas=None, load_only_unet=False, ignore_keys=())
    init_from = checkpoint(section, folder)
    section.end(("monitor", "first_stage_key", "cond_stage_key", "cond_stage_trainable", "log_every_t", "clip_denoised"))
    return LatentConfig(
        data=DataConfig(
            "image-folder", size=size * autoencoder.size_multiple, flip=False, condition=shown, lowres_size=size
        ),
        model=model,
        diffusion=checked(DiffusionConfig, process, section.path),
        train=checked(ImageTrainConfig, train, section.path),
        init_from=init_from,
        first_stage=weights,
        first_stage_model=autoencoder,
        latent_scale=None if by_std else scale,
    )


def warm_up(section: Section) -> dict[str, Any]:
    """The steps of warm-up of a scheduler_config; what follows is a constant learning rate, or a cosine's decay."""
    if section.content.get("scheduler_config") is None:
        section.take("scheduler_config", None)
        return {}
    names = ("LambdaLinearScheduler", "LambdaWarmUpCosineScheduler")
    known: dict[str, Callable] = {f"ldm.lr_scheduler.{name}": dict for name in names}
    scheduler = section.section("scheduler_config")
    decay = str(scheduler.content.get("target")).endswith(names[1])
    _, params = scheduler.target(known)
    steps = params.take("warm_up_steps")
    found = {"warmup_steps": steps[0] if isinstance(steps, tuple) and steps else steps, "lr_decay": decay}
    return found | (params.rename({"max_decay_steps": "total_steps"}) if decay else {})


RUNS: dict[str, Callable[[Section, int, float, Path], Config]] = {
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_run(kl_model),
    "ldm.models.autoencoder.VQModel": autoencoder_run(vq_model),
    "taming.models.vqgan.VQModel": autoencoder_run(vq_model),
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_run,
}
