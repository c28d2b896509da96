"""ms_diffusion: diffusion models in MindSpore, small, exact, fast.

The public names are imported when first used, so that `runtime` can prepare the process before MindSpore is loaded.
"""

from importlib import import_module

from . import runtime  # noqa: F401

_HOMES = {
    "schedules": "SCHEDULES cosine_beta_schedule linear_beta_schedule quadratic_beta_schedule sigmoid_beta_schedule "
    "rescale_zero_terminal_snr sqrt_linear_beta_schedule",
    "process": "DiffusionConfig GaussianDiffusion",
    "denoiser": "guide inpaint make_denoiser with_self_conditioning self_conditioned with_label",
    "samplers": "SAMPLERS SPACINGS SeededNoise generate sample_ddim sample_ddpm sample_dpmpp_2m sample_heun sample_plms "
    "sample_unipc sampling_timesteps",
    "editing": "invert_ddim sample_repaint slerp",
    "likelihood": "bits_per_dim dequantised_bits_per_dim make_divergence ode_log_likelihood",
    "randomness": "ImportanceTimesteps antithetic_timesteps drop_labels offset_noise uniform_timesteps",
    "models.unet": "ConvNextBlock ResnetBlock Unet UnetConfig",
    "models.mlp": "MLP MLPConfig ResidualMLP ResidualMLPConfig",
    "models.attention": "Attention LinearAttention",
    "models.layers": "Downsample PreNorm Residual SinusoidalPositionEmbeddings Upsample",
    "training.step": "EMA average_after_training make_optimizer make_train_step",
    "training.checkpoint": "Checkpoint",
    "training.presets": "AutoencoderTrainConfig PRESETS Config DataConfig PointsConfig TrainConfig load_first_stage load_run",
    "data.captions": "draw_captions tokens",
    "data.conditions": "condition_image",
    "latent": "FirstStage in_patches",
    "data.batches": "load_images make_dataset",
    "data.points": "TOYS load_points",
    "models.classifier": "Classifier load_classifier",
    "models.autoencoder": "AutoencoderConfig AutoencoderKL gaussian_kl gaussian_mode gaussian_nll gaussian_sample normal_kl",
    "models.context": "LatentUnet LatentUnetConfig TextEncoder",
    "models.unet_ldm": "SpatialTransformer UNetModel UNetModelConfig",
    "models.lpips": "LPIPS classifier_distance load_lpips",
    "models.discriminator": "NLayerDiscriminator",
    "losses": "adaptive_weight autoencoder_loss discriminator_loss generator_loss",
    "models.inception": "InceptionV3 load_inception",
    "metrics.features": "Features",
    "metrics.distances": "compare energy_distance frechet_distance kernel_distance maximum_mean_discrepancy mean_and_covariance "
    "precision_recall psnr sliced_wasserstein ssim",
    "convert": "load_into load_pretrained load_torch_state_dict",
    "images": "save_gif save_grid save_loss_curve to_float to_uint8",
    "runtime": "UserError compiled set_device",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__():
    return __all__
