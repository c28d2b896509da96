"""The table of named runs: what `--preset` and `md.train` take. docs/quality.md says how the values were found."""

from dataclasses import replace

from ..data.captions import LENGTH, WORDS
from ..data.points import TOYS
from ..models.autoencoder import AutoencoderConfig, VQConfig
from ..models.context import LatentUnetConfig
from ..models.dit import DiTConfig
from ..models.mlp import MLPConfig, ResidualMLPConfig
from ..models.unet import UnetConfig
from ..process import DiffusionConfig
from .config import Config, DataConfig, DiffusionTrainConfig, ImageTrainConfig, override
from .tasks.autoencoder import AutoencoderRunConfig, AutoencoderTrainConfig
from .tasks.latents import LatentConfig
from .tasks.pixels import PixelConfig
from .tasks.points import PointsConfig, PointsDataConfig

# Sized for a few minutes on two CPU cores
QUICK = PixelConfig(
    data=DataConfig("fashion-mnist-mini"),
    # Predicting x0 gives whole shapes much sooner than predicting eps or v
    diffusion=DiffusionConfig(schedule="cosine", objective="x0", loss="l2"),
    model=UnetConfig(dim=32, init_dim=32, dim_mults=(1, 2), use_convnext=False, patch_size=2),
    train=ImageTrainConfig(
        total_steps=4800,
        batch_size=16,
        lr=3e-3,
        warmup_steps=50,
        ema_decay=0.995,
        log_every=25,
        sample_every=1600,
        save_every=800,
    ),
)

# Points in the plane: a network that learns in seconds, then the network and training of the S-curve experiment
REPORTS = DiffusionTrainConfig(log_every=100, sample_every=5000, save_every=5000, sample_num=2000, sample_steps=100)
SCURVE = PointsConfig(
    diffusion=DiffusionConfig(schedule="sigmoid", loss="l2"),
    model=ResidualMLPConfig(),
    train=replace(REPORTS, total_steps=10_000, batch_size=256, steps_per_call=100, timestep_sampling="antithetic", lr=2e-3),
)
# Rectified flow: x_t = (1 - s) x_0 + s noise, and the network learns its velocity. Points need more times near the data
SCURVE_FLOW = replace(SCURVE, diffusion=DiffusionConfig(schedule="flow", objective="v", loss="l2", shift=0.5))
SCURVE_SEED = replace(
    SCURVE,
    diffusion=replace(SCURVE.diffusion, num_timesteps=100),
    model=MLPConfig(),
    train=replace(SCURVE.train, total_steps=316_000, batch_size=128, lr=1e-3, sample_every=79_000, save_every=79_000),
)

# That experiment to the letter: points divided by 10, betas from 1e-5 to 5e-3 in 100 steps (which `sigmoid` scales by 10),
# Adam at a constant rate, no average
SCURVE_EXACT = replace(
    SCURVE_SEED,
    data=PointsDataConfig(scale=10.0),
    diffusion=replace(SCURVE_SEED.diffusion, beta_start=1e-6, beta_end=5e-4),
    train=replace(SCURVE_SEED.train, lr_decay=False, warmup_steps=0, ema_decay=0.0),
)

# Class-conditional, on all images without flips, since shoes face left
CLASS = PixelConfig(
    data=DataConfig(flip=False),
    diffusion=DiffusionConfig(schedule="cosine", objective="x0", loss="l2", weighting="min-snr"),
    model=replace(QUICK.model, dim=48, init_dim=48, scale_shift=True, final_skip=True, num_classes=10),
    train=ImageTrainConfig(
        total_steps=6000, batch_size=64, lr=2e-3, ema_decay=0.998, sample_guidance=2.0, sample_guidance_interval=(150, 750)
    ),
)
# The same on rectified flow, predicting its velocity; guided at the same noise as CLASS
FLOW_GUIDANCE = (190, 710)
CLASS_FLOW = replace(
    CLASS,
    diffusion=DiffusionConfig(schedule="flow", objective="v", loss="l2"),
    train=replace(CLASS.train, sample_guidance_interval=FLOW_GUIDANCE),
)
# The same with the noise levels, the preconditioning and the times of EDM; guided at the same noise as CLASS
CLASS_EDM = replace(
    CLASS,
    diffusion=DiffusionConfig(schedule="edm", objective="v", loss="l2", sigma_data=0.7),
    train=replace(
        CLASS.train,
        timestep_sampling="log-normal",
        timestep_mean=-1.2,
        timestep_std=1.2,
        sample_guidance_interval=(280, 500),
    ),
)
LONG = replace(CLASS.train, warmup_steps=500, ema_decay=0.999, timestep_sampling="antithetic")
LARGE = replace(CLASS, model=replace(CLASS.model, dim=64, init_dim=64), train=replace(LONG, total_steps=22_000, lr=1.5e-3))
XLARGE = replace(
    LARGE,
    model=replace(LARGE.model, dim=96, init_dim=96),
    train=replace(
        LARGE.train,
        total_steps=12_800,
        batch_size=128,
        optimizer="muon",
        lr=4e-3,
        sample_guidance_interval=(100, 600),
    ),
)
# Consistency tuning of a trained run, by default the bundled one, for samples in one or two network calls
FAST = replace(
    LARGE,
    init_from="fashion-mnist-large",
    train=replace(
        LONG,
        total_steps=12_600,
        lr=3e-4,
        warmup_steps=50,
        ema_decay=0.998,
        label_dropout=0.0,
        sample_guidance=1.0,
        sample_guidance_interval=None,
        sample_steps=2,
        consistency=(3, 4),
        teacher_guidance=1.75,
        teacher_guidance_interval=(150, 750),
    ),
)
EMOJI = replace(LONG, total_steps=4500, warmup_steps=300, save_every=500)

# For likelihoods, without classes: the loss is the variational bound, and x comes with sines of 1 to 64 levels
LIKELIHOOD = PixelConfig(
    data=DataConfig(flip=False),
    diffusion=DiffusionConfig(schedule="log_snr", objective="eps", loss="l2"),
    model=replace(CLASS.model, num_classes=None, fourier_features=7),
    train=ImageTrainConfig(total_steps=24_000, batch_size=32, lr=1.5e-3, warmup_steps=300, timestep_sampling="antithetic"),
)

# A transformer on patches of 4 x 4 pixels, which Adam trains much more slowly
DIT = replace(
    CLASS,
    model=DiTConfig(hidden_size=160, depth=6, num_heads=5, patch_size=4, num_classes=10),
    train=replace(CLASS.train, lr=6e-3, optimizer="muon"),
)

# From images of 32 x 32 pixels to latents of 8 x 8 x 2 numbers, and the diffusion of these latents.
# The autoencoder's losses are sums over an image, hence the large clip_norm.
AUTOENCODER = AutoencoderRunConfig(
    model=AutoencoderConfig(
        ch=16, ch_mult=(1, 2, 4), num_res_blocks=1, channels=1, resolution=32, z_channels=2, embed_dim=2, groups=8
    ),
    train=AutoencoderTrainConfig(
        total_steps=12_000, batch_size=16, lr=4e-3, clip_norm=1e4, ema_decay=0.998, kl_weight=1e-2, disc_start=9500
    ),
)
# The same with a codebook of 512 vectors, of which an image has 8 x 8
AUTOENCODER_VQ = AutoencoderRunConfig(
    model=VQConfig(
        ch=16,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        channels=1,
        resolution=32,
        z_channels=4,
        embed_dim=4,
        n_embed=512,
        groups=8,
    ),
    train=AutoencoderTrainConfig(total_steps=12_000, batch_size=16, lr=4e-3, ema_decay=0.998, disc_start=9500),
)
LATENT = LatentConfig(
    diffusion=DiffusionConfig(schedule="cosine", objective="v", loss="l2", weighting="min-snr"),
    model=LatentUnetConfig(groups=8),
    train=replace(LONG, total_steps=10_000),
)
LATENT_FLOW = replace(
    LATENT,
    diffusion=DiffusionConfig(schedule="flow", objective="v", loss="l2"),
    train=replace(LATENT.train, sample_guidance_interval=FLOW_GUIDANCE),
)
KL_F8 = AutoencoderTrainConfig(
    total_steps=500_000, batch_size=4, lr=1.8e-5, lr_decay=False, warmup_steps=0, clip_norm=1e9, adam_betas=(0.5, 0.9)
)

PRESETS: dict[str, Config] = {  # PRESETS["mine"] = config adds a preset
    "quick": QUICK,
    "quick-class": override(QUICK, num_classes=10),
    "quick-upscale": override(QUICK, condition="lowres", cond_channels=1),
    "fashion-mnist": PixelConfig(),
    # The annotated diffusion model's own recipe for comparison: its process, constant learning rate and no average
    "fashion-mnist-seed": PixelConfig(
        diffusion=DiffusionConfig(num_timesteps=200, schedule="unscaled_linear"),
        train=ImageTrainConfig(lr_decay=False, warmup_steps=0, ema_decay=0.0, sample_steps=200),
    ),
    "fashion-mnist-resnet": PixelConfig(model=UnetConfig(dim=32, use_convnext=False)),
    "fashion-mnist-class": CLASS,
    "fashion-mnist-flow": CLASS_FLOW,
    "fashion-mnist-edm": CLASS_EDM,
    "fashion-mnist-large": LARGE,
    "fashion-mnist-xlarge": XLARGE,
    "fashion-mnist-fast": FAST,
    "fashion-mnist-dit": DIT,
    "fashion-mnist-likelihood": LIKELIHOOD,
    **{name: replace(SCURVE, data=PointsDataConfig(name)) for name in TOYS},
    "scurve-seed": SCURVE_SEED,
    "scurve-exact": SCURVE_EXACT,
    "scurve-flow": SCURVE_FLOW,
    # Colour pictures with captions: python -m benchmarks.make_emoji data/emoji
    "emoji": PixelConfig(
        data=DataConfig("image-folder", dir="data/emoji", size=32, flip=False, validation=0.1),
        diffusion=replace(CLASS.diffusion),
        model=UnetConfig(
            dim=48,
            init_dim=48,
            dim_mults=(1, 2, 3),
            channels=3,
            use_convnext=False,
            scale_shift=True,
            final_skip=True,
            patch_size=2,
            vocab_size=1024,
            max_length=16,
        ),
        train=EMOJI,
    ),
    "autoencoder": AUTOENCODER,
    "autoencoder-vq": AUTOENCODER_VQ,
    "autoencoder-kl-f8": AutoencoderRunConfig(
        data=DataConfig("image-folder", size=256),
        model=AutoencoderConfig(),
        train=replace(KL_F8, disc_start=50_001, disc_lr=1.8e-5, disc_channels=64, disc_layers=3),
    ),
    "latent": LATENT,
    "latent-flow": LATENT_FLOW,
    # From 8 x 8 pixels, and from an image with a hole and its class: concat and hybrid conditioning
    "latent-upscale": override(
        replace(LATENT, train=replace(LATENT.train, sample_guidance=1.0, sample_guidance_interval=None)),
        **{"data.condition": "lowres", "data.lowres_size": 8, "model.condition": "none"},
        **{"cond_channels": 1, "num_classes": None, "context_dim": None},
    ),
    "latent-inpaint": override(LATENT, **{"data.condition": "mask", "cond_channels": 3}),
    "latent-text": override(
        LATENT, total_steps=6000, **{"model.condition": "text"}, num_classes=None, vocab_size=len(WORDS), max_length=LENGTH
    ),
}
