"""ms_diffusion: diffusion models in MindSpore, small, exact, fast.

    run = md.train("quick", run_dir="runs/mine")
    x = run.sample(64, sampler="dpmpp_2m", steps=15)

The public names are imported when they are first used, so that `runtime` can prepare the process before MindSpore is loaded.
"""

# ruff: noqa: I001

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import runtime, versions  # noqa: F401

if TYPE_CHECKING:  # the public names; below, the same lines say where each is found
    # fmt: off
    from .convert import (load_into as load_into, load_pretrained as load_pretrained,
        load_torch_state_dict as load_torch_state_dict)
    from .data.batches import (DATASETS as DATASETS, ImageSet as ImageSet, load_images as load_images,
        make_dataset as make_dataset)
    from .data.captions import tokens as tokens
    from .data.conditions import condition_image as condition_image
    from .data.points import Normalizer as Normalizer, TOYS as TOYS, load_points as load_points
    from .denoiser import (exact_denoiser as exact_denoiser, guide as guide, inpaint as inpaint,
        make_denoiser as make_denoiser, self_conditioned as self_conditioned, with_label as with_label,
        with_self_conditioning as with_self_conditioning)
    from .editing import invert_ddim as invert_ddim, sample_repaint as sample_repaint, slerp as slerp
    from .images import (save_gif as save_gif, save_grid as save_grid, save_loss_curve as save_loss_curve,
        to_float as to_float, to_uint8 as to_uint8)
    from .latent import FirstStage as FirstStage, in_patches as in_patches
    from .likelihood import (bits_per_dim as bits_per_dim, dequantised_bits_per_dim as dequantised_bits_per_dim,
        make_divergence as make_divergence, ode_log_likelihood as ode_log_likelihood)
    from .losses import (adaptive_weight as adaptive_weight, autoencoder_loss as autoencoder_loss,
        discriminator_loss as discriminator_loss, generator_loss as generator_loss, vq_loss as vq_loss)
    from .metrics.distances import (compare as compare, energy_distance as energy_distance,
        frechet_distance as frechet_distance, kernel_distance as kernel_distance,
        maximum_mean_discrepancy as maximum_mean_discrepancy, mean_and_covariance as mean_and_covariance,
        precision_recall as precision_recall, psnr as psnr, sliced_wasserstein as sliced_wasserstein, ssim as ssim)
    from .metrics.features import Features as Features
    from .models.attention import Attention as Attention, LinearAttention as LinearAttention
    from .models.autoencoder import (AutoencoderConfig as AutoencoderConfig, AutoencoderKL as AutoencoderKL,
        VectorQuantizer as VectorQuantizer, VQConfig as VQConfig, VQModel as VQModel, codebook_use as codebook_use,
        gaussian_kl as gaussian_kl, gaussian_mode as gaussian_mode, gaussian_nll as gaussian_nll,
        gaussian_sample as gaussian_sample, normal_kl as normal_kl)
    from .models.classifier import Classifier as Classifier, load_classifier as load_classifier
    from .models.context import (BERTEmbedder as BERTEmbedder, ClassEmbedder as ClassEmbedder, LatentUnet as LatentUnet,
        LatentUnetConfig as LatentUnetConfig, SpatialRescaler as SpatialRescaler, TextEncoder as TextEncoder)
    from .models.discriminator import NLayerDiscriminator as NLayerDiscriminator
    from .models.dit import DiT as DiT, DiTConfig as DiTConfig
    from .models.inception import InceptionV3 as InceptionV3, load_inception as load_inception
    from .models.layers import (Downsample as Downsample, PreNorm as PreNorm, Residual as Residual,
        SinusoidalPositionEmbeddings as SinusoidalPositionEmbeddings, Upsample as Upsample)
    from .models.lpips import LPIPS as LPIPS, classifier_distance as classifier_distance, load_lpips as load_lpips
    from .models.mlp import (MLP as MLP, MLPConfig as MLPConfig, ResidualMLP as ResidualMLP,
        ResidualMLPConfig as ResidualMLPConfig)
    from .models.unet import (ConvNextBlock as ConvNextBlock, ResnetBlock as ResnetBlock, Unet as Unet,
        UnetConfig as UnetConfig)
    from .models.unet_ldm import (SpatialTransformer as SpatialTransformer, UNetModel as UNetModel,
        UNetModelConfig as UNetModelConfig)
    from .process import DiffusionConfig as DiffusionConfig, GaussianDiffusion as GaussianDiffusion, Process as Process
    from .randomness import (ImportanceTimesteps as ImportanceTimesteps, antithetic_timesteps as antithetic_timesteps,
        drop_labels as drop_labels, offset_noise as offset_noise, uniform_timesteps as uniform_timesteps)
    from .runtime import UserError as UserError, compiled as compiled, set_device as set_device
    from .samplers import (SAMPLERS as SAMPLERS, SPACINGS as SPACINGS, SeededNoise as SeededNoise, generate as generate,
        sample_ddim as sample_ddim, sample_ddpm as sample_ddpm, sample_dpmpp_2m as sample_dpmpp_2m,
        sample_heun as sample_heun, sample_plms as sample_plms, sample_unipc as sample_unipc,
        sampling_timesteps as sampling_timesteps)
    from .sampling import Sampling as Sampling, sample as sample
    from .schedules import (SCHEDULES as SCHEDULES, cosine_beta_schedule as cosine_beta_schedule,
        linear_beta_schedule as linear_beta_schedule, quadratic_beta_schedule as quadratic_beta_schedule,
        rescale_zero_terminal_snr as rescale_zero_terminal_snr, sigmoid_beta_schedule as sigmoid_beta_schedule,
        sqrt_linear_beta_schedule as sqrt_linear_beta_schedule)
    from .training.checkpoint import Checkpoint as Checkpoint
    from .training.compvis import from_compvis as from_compvis
    from .training.config import (Config as Config, DataConfig as DataConfig, DiffusionTrainConfig as DiffusionTrainConfig,
        ImageTrainConfig as ImageTrainConfig, TrainConfig as TrainConfig)
    from .training.latent_diffusion import (DDPM as DDPM, DiagonalGaussianDistribution as DiagonalGaussianDistribution,
        LatentDiffusion as LatentDiffusion, LPIPSWithDiscriminator as LPIPSWithDiscriminator)
    from .training.loop import train as train
    from .training.presets import PRESETS as PRESETS
    from .training.pipeline import load as load
    from .training.runs import Run as Run, bundled_models as bundled_models
    from .training.step import (EMA as EMA, average_after_training as average_after_training,
        make_optimizer as make_optimizer, make_train_step as make_train_step)
    from .training.tasks.autoencoder import (AutoencoderRunConfig as AutoencoderRunConfig,
        AutoencoderTrainConfig as AutoencoderTrainConfig, load_first_stage as load_first_stage)
    from .training.tasks.base import Task as Task
    from .training.tasks.diffusion import DiffusionTask as DiffusionTask
    from .training.tasks.latents import LatentConfig as LatentConfig
    from .training.tasks.pixels import PixelConfig as PixelConfig
    from .training.tasks.points import PointsConfig as PointsConfig, PointsDataConfig as PointsDataConfig
    # fmt: on

__version__ = "0.2.0"

# Name -> module, from the imports above, so that each public name is written once
_IMPORTS = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.ImportFrom)]
_HOME_OF = {alias.name: node.module for node in _IMPORTS for alias in node.names if alias.asname}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    versions.check()
    versions.check_limits()
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
