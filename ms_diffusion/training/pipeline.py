"""Stable Diffusion 1 and 2 in a folder of diffusers, opened as a run: `md.load("stable-diffusion-v1-5")`.

The folder stays as it is: model_index.json, and unet, vae, text_encoder, tokenizer and scheduler, each with its own files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from ..convert import load_pretrained
from ..data.batches import ImageSet
from ..fields import POSITIVE, Bounds
from ..latent import PIXELS, FirstStage
from ..models.autoencoder import AutoencoderConfig
from ..models.context import LatentUnetConfig
from ..names import PREDICTION_TYPES
from ..process import DiffusionConfig, GaussianDiffusion, Process
from ..runtime import UserError, initialise_ranks, set_device
from ..sampling import Generator
from ..schedules import cosine_beta_schedule, rescale_zero_terminal_snr
from .config import DataConfig, ImageTrainConfig
from .runs import Run
from .tasks.base import Request
from .tasks.edits import Plan
from .tasks.latents import LatentConfig, LatentTask
from .text_encoder import WHOLE, Settings, load_text_encoder

INDEX = "model_index.json"  # what a folder of diffusers holds
GUIDANCE = 7.5  # the default of the pipelines of diffusers
OBJECTIVES = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
EACH = tuple[WHOLE, ...]

# The parts, and the classes that are read
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

# Settings that other networks have and these have not; where a file lacks one, this is the default of diffusers
# fmt: off
UNET_ONLY = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False, "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu", "norm_eps": 1e-5,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "dual_cross_attention": False, "class_embed_type": None,
    "addition_embed_type": None, "num_class_embeds": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "cross_attention_norm": None,
    "mid_block_only_cross_attention": None, "reverse_transformer_layers_per_block": None,
}
VAE_ONLY = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "shift_factor": None, "latents_mean": None, "latents_std": None,
}
# fmt: on


def read_unet(settings: Settings, latent_channels: int, latent_size: int) -> LatentUnetConfig:
    """The network of a UNet2DConditionModel."""
    settings.only(UNET_ONLY)
    widths = settings.get("block_out_channels", EACH, (320, 640, 1280, 1280))
    levels = len(widths)
    down = settings.get("down_block_types", tuple[str, ...], ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = settings.get("up_block_types", tuple[str, ...], ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    mirrored = tuple(name.replace("Up", "Down") for name in reversed(up))
    if {*down} - {"CrossAttnDownBlock2D", "DownBlock2D"} or mirrored != down or len(down) != levels:
        raise UserError(f"{settings.path}: block types {down} and {up} are not those of Stable Diffusion: it cannot be read")
    if any(width % widths[0] for width in widths):
        raise UserError(f"{settings.path}: block_out_channels {widths} are no multiples of the first: it cannot be read")
    # The number of heads of each level, which diffusers' files call attention_head_dim
    name = "attention_head_dim" if settings.values.get("num_attention_heads") is None else "num_attention_heads"
    heads = settings.get(name, WHOLE | EACH, 8)
    each = (heads,) * levels if isinstance(heads, int) else heads
    sizes = {width / count for width, count in zip(widths, each, strict=False)}
    if len(each) != levels or (len({*each}) > 1 and len(sizes) > 1):
        raise UserError(f"{settings.path}: {name} is {heads}: it must be one number, or give all heads the same width")
    depth = settings.get("transformer_layers_per_block", WHOLE | EACH, 1)
    per_level = settings.get("layers_per_block", WHOLE | EACH, 2)
    for name, value in {"transformer_layers_per_block": depth, "layers_per_block": per_level}.items():
        if not isinstance(value, int) and len({*value}) > 1:
            raise UserError(f"{settings.path}: {name} is {value}: it must be the same for each level")
    in_channels = settings.get("in_channels", WHOLE, 4)
    cond_channels = in_channels - latent_channels
    if cond_channels not in (0, latent_channels + 1) or settings.get("out_channels", WHOLE, 4) != latent_channels:
        known = f"{latent_channels}, or {2 * latent_channels + 1} for inpainting"
        raise UserError(f"{settings.path}: in_channels is {in_channels}, where {known}, can be read")
    return LatentUnetConfig(
        in_channels=latent_channels,
        cond_channels=cond_channels,
        out_channels=latent_channels,
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=per_level if isinstance(per_level, int) else per_level[0],
        attention_resolutions=tuple(2**i for i, kind in enumerate(down) if kind == "CrossAttnDownBlock2D"),
        num_heads=each[0] if len({*each}) == 1 else None,
        num_head_channels=None if len({*each}) == 1 else widths[0] // each[0],
        transformer_depth=depth if isinstance(depth, int) else depth[0],
        groups=settings.get("norm_num_groups", WHOLE, 32),
        context_dim=settings.get("cross_attention_dim", WHOLE, 1280),
        condition="context",
        num_classes=None,
        latent_size=latent_size,
        channels=3,
    )


def read_vae(settings: Settings) -> AutoencoderConfig:
    """The first stage of an AutoencoderKL."""
    settings.only(VAE_ONLY)
    widths = settings.get("block_out_channels", EACH, (64,))
    kinds = {*settings.get("down_block_types", tuple[str, ...], ("DownEncoderBlock2D",))}
    kinds |= {*settings.get("up_block_types", tuple[str, ...], ("UpDecoderBlock2D",))}
    channels = settings.get("in_channels", WHOLE, 3)
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"} or any(width % widths[0] for width in widths):
        raise UserError(f"{settings.path}: its blocks are not those of Stable Diffusion: it cannot be read")
    if channels != 3 or settings.get("out_channels", WHOLE, 3) != 3:
        raise UserError(f"{settings.path}: in_channels is {channels}: the pictures must have 3, red, green and blue")
    latent = settings.get("latent_channels", WHOLE, 4)
    return AutoencoderConfig(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=settings.get("layers_per_block", WHOLE, 1),
        resolution=2 ** (len(widths) - 1),  # which only attn_resolutions refer to, and there are none
        z_channels=latent,
        embed_dim=latent,
        groups=settings.get("norm_num_groups", WHOLE, 32),
    )


def read_scheduler(settings: Settings) -> GaussianDiffusion:
    """The process of a scheduler of diffusers, whichever it is: all share the names of these settings."""
    name = settings.get("_class_name", str, "DDIMScheduler")
    one_step = ("DDIMScheduler", "DDPMScheduler")  # their defaults are others than those of the schedulers of an ODE
    T = settings.get("num_train_timesteps", Annotated[int, Bounds(2, 10**5)], 1000)
    number = Annotated[float, Bounds(0, 1, low_open=True, high_open=True)]
    start, end = settings.get("beta_start", number, 1e-4), settings.get("beta_end", number, 0.02)
    kind = settings.get("beta_schedule", str, "linear")
    betas = settings.get("trained_betas", tuple[number, ...] | None, None)
    if betas is None:
        schedules = {
            "linear": np.linspace(start, end, T),
            "scaled_linear": np.linspace(start**0.5, end**0.5, T) ** 2,
            "squaredcos_cap_v2": cosine_beta_schedule(T),
        }
        if kind not in schedules:
            raise UserError(f"{settings.path}: beta_schedule is {kind!r}: choose one of {', '.join(schedules)}")
        betas = schedules[kind]
    predicts = settings.get("prediction_type", str, "epsilon")
    if predicts not in OBJECTIVES:
        raise UserError(f"{settings.path}: prediction_type is {predicts!r}: choose one of {', '.join(OBJECTIVES)}")
    clip = settings.get("clip_sample", bool, name in one_step)
    settings.only({"thresholding": False} | ({"clip_sample_range": 1.0} if clip else {}))
    if settings.get("rescale_betas_zero_snr", bool, False):
        betas = rescale_zero_terminal_snr(np.array(betas))
    try:
        process = GaussianDiffusion(np.array(betas), OBJECTIVES[predicts], "l2", clip_denoised=clip)
    except ValueError as e:
        raise UserError(f"{settings.path}: {e}") from e
    even = ("leading", "linspace", "trailing")
    process.spacing = settings.get(
        "timestep_spacing", str, "leading" if name in (*one_step, "PNDMScheduler") else "linspace"
    )
    if process.spacing not in even:
        raise UserError(f"{settings.path}: timestep_spacing is {process.spacing!r}: choose one of {', '.join(even)}")
    process.steps_offset = settings.get("steps_offset", Annotated[int, Bounds(0, T - 1)], 0)
    if not settings.get("set_alpha_to_one", bool, name != "PNDMScheduler"):
        process.last_level = process.level(0)
    return process


class PipelineTask(LatentTask):
    """Stable Diffusion: its process, its text encoder, and its first stage come from a folder.

    Args:
        size: Height and width of the pictures; by default those of the training."""

    def __init__(self, folder: Path, size: Sequence[int] = ()):
        self.folder = folder
        index = Settings(folder / INDEX)
        if (name := index.get("_class_name", str, "")) not in PIPELINES:
            raise UserError(f"{folder} holds a {name[:200]}, not Stable Diffusion 1 or 2 ({PIPELINES[0]})")
        for part, names in CLASSES.items():
            _, found = index.get(part, tuple[str | None, str | None], (None, None))
            if found not in names:
                raise UserError(f"{index.path}: {part} is {found!r:.200}, where {names[0]} is expected: it cannot be read")
        unet, vae = [Settings(folder / part / "config.json") for part in ("unet", "vae")]
        self.autoencoder = read_vae(vae)
        self.process = read_scheduler(Settings(folder / "scheduler" / "scheduler_config.json"))
        f, latents = self.autoencoder.size_multiple, unet.get("sample_size", WHOLE | EACH, 64)
        self.size = size_of(size or np.multiply(latents, f).ravel().tolist())
        multiple = f * 2 ** (len(unet.get("block_out_channels", EACH, (1,) * 4)) - 1)
        if wrong := [side for side in self.size if side % multiple or side == 0]:
            fit = max(round(wrong[0] / multiple), 1) * multiple
            raise UserError(f"--size is {wrong[0]}: it must be divisible by {multiple}, such as {fit}")
        height, width = (side // f for side in self.size)
        model = read_unet(unet, self.autoencoder.embed_dim, height)
        scale = vae.get("scaling_factor", Annotated[float, POSITIVE], 0.18215)
        config = LatentConfig(
            data=DataConfig("arrays", size=self.size[0], flip=False, condition="mask" if model.cond_channels else "none"),
            model=model,
            diffusion=DiffusionConfig(self.process.num_timesteps, objective=self.process.objective),
            train=ImageTrainConfig(sample_guidance=GUIDANCE),
            latent_scale=scale,
        )
        super().__init__(config)
        self.shape = (self.autoencoder.embed_dim, height, width)

    def build_parts(self) -> tuple[nn.Cell, Process]:
        with no_init_parameters():  # MindSpore's own, which take 20 s for 860 million
            return self.config.model.build(None), self.process

    def open(self, home: Path, state: dict[str, Any]) -> None:
        self.run_dir = home
        autoencoder = self.autoencoder.build()
        load_pretrained(autoencoder, home / "vae")
        self.first_stage = FirstStage(autoencoder, self.config.latent_scale or 1, self.autoencoder.size_multiple)
        self.labelling = load_text_encoder(home, self.config.model.context_dim or 0)
        self.null_label = self.labelling.null

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    def load_set(self, split: str) -> ImageSet:
        raise UserError(f"{self.folder} comes without images: give files, by --inpaint, --init or --image")

    def encode_condition(self, cond: np.ndarray) -> np.ndarray:
        z, hidden = np.split(super().encode_condition(cond), [self.shape[0]], 1)
        return np.concatenate([np.maximum(hidden, 0), z], 1)  # the order and the values of diffusers

    def plan(self, run: Run, request: Request) -> Plan:
        """Pictures as they are; of an edit the result alone, but for an interpolation."""
        made = super().plan(run, replace(request, num=request.num or (8 if request.interpolate else 1)))
        made.scale = 1
        if not request.interpolate and not request.image:
            made.columns, made.arrange = None, lambda x: x
        return made

    def generator(self, net: nn.Cell, diffusion: Process) -> Generator:
        generator = super().generator(net, diffusion)
        generator.batch_size = max(PIXELS // (self.size[0] * self.size[1]), 1)
        return generator


def size_of(size: Sequence[int]) -> tuple[int, int]:
    """Height and width, from both or one number for both."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise UserError(f"--size is {' '.join(map(str, size))}: give height and width in pixels, or one number for both")
    return size[0], size[-1]


class PipelineRun(Run):
    """Stable Diffusion in a folder of diffusers, as a run: `md.load("stable-diffusion-v1-5")`. Raises UserError if it cannot
    be read, or is another model.

    Args:
        path: The folder.
        size: Height and width of the pictures in pixels, or one number for both; by default those of the training."""

    def __init__(self, path: str | Path, size: Sequence[int] = ()):
        self.name, self.home, self.step = str(path), Path(path), None
        self.task: Any = PipelineTask(self.home, size)
        self.config = self.task.config
        self.net, self.diffusion = self.task.build()
        load_pretrained(self.net, self.home / "unet")
        self.net.set_train(False)
        self.task.open(self.home, {})

    def sample(self, num: int = 1, **options: Any) -> np.ndarray:
        """As `Run.sample`, by default one picture: images (num, H, W, 3) uint8 for a `prompt`."""
        return super().sample(num, **options)


def load(run: str | Path, weights: str = "ema", ema_length: float | None = None, device: str = "auto",
        size: Sequence[int] = ()) -> Run:  # fmt: skip
    """The trained run in a folder, at one of its checkpoints, or a bundled model, by the arguments of `Run`; or the Stable
    Diffusion in a folder of diffusers, which draws pictures of this `size`: height and width, or one number for both. Raises
    UserError if it cannot be loaded, or there is no such device."""
    set_device(device)
    initialise_ranks()
    if isinstance(run, str | Path) and (Path(run) / INDEX).is_file():
        if ema_length is not None:
            raise UserError(f"{run} keeps no averages for --ema-length: leave it out")
        return PipelineRun(run, size)
    if size:
        raise UserError(f"--size is for folders of Stable Diffusion, and {run} draws pictures of one size: leave it out")
    return Run(run, weights, ema_length)
