"""Training: configurations, presets, the kinds of runs, the compiled step, checkpoints and the loop."""

from . import pipeline  # noqa: F401, which opens folders of diffusers
from .tasks import autoencoder, latents, pixels, points  # noqa: F401, the kinds that a config.json may name
