"""How samples are drawn from a run: the flags that sample.py and the evaluation share, and what they mean."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from .data.captions import plain_captions
from .denoiser import guide, make_denoiser, self_conditioned, with_label
from .runtime import DEVICES, UserError
from .samplers import SAMPLERS, SPACINGS, generate, sample_ddim, sampling_timesteps


@dataclass
class Sampling:
    """How samples are drawn from a run."""

    seed: int = 0
    """Image i of a seed is the same whatever the number and the batch size."""
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """ddpm is the ancestral sampler; the others are deterministic, dpmpp_2m and unipc good in 10 to 15 steps."""
    steps: int = 50
    """Steps of the sampler, at most the timesteps of training; each calls the network once (heun: twice)."""
    spacing: Literal[SPACINGS] | None = None
    """Where the steps lie; if not given linspace for ddpm and ddim, logsnr for the others."""
    eta: float = 0.0
    """Noise of ddim, from 0, none, to 1, that of ddpm."""
    v_posterior: float | None = None
    """Share of beta in ddpm's variance, if not the run's."""
    guidance: float | None = None
    """Classifier-free guidance towards the class: 0 takes no notice of it, 1 is the plain network, more sharpens; if not
    given the run's --train.sample-guidance."""
    guidance_rescale: float = 0.0
    """Share of the guided x_0 that is brought back to its contrast without guidance."""
    guidance_interval: tuple[int, int] | None = None
    """First and last timestep that are guided; if not given all, or the run's where --guidance is the run's."""
    batch_size: int | None = None
    """Images or points at once; if not given 64, or all points."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, or the weights as trained."""
    ema_length: float | None = None
    """Length of another average, chosen after training, for a run with --train.ema-lengths: 0.1 is a tenth of the run."""
    device: Literal[DEVICES] = "auto"
    """Where to run; auto is Ascend, then GPU, then CPU."""

    def settle(self, config, T: int) -> None:
        """Take from the run what is not given, and refuse what does not fit together, or not to the run."""
        told, dropout = config.model.null_label is not None, config.train.label_dropout
        if self.guidance is None:
            self.guidance = config.train.sample_guidance
            self.guidance_interval = self.guidance_interval or config.train.sample_guidance_interval
        if self.seed < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise UserError("--seed must be at least 0, --batch-size at least 1")
        if not 1 <= self.steps <= T:
            raise UserError(f"--steps {self.steps}: choose from 1 to {T}, the timesteps this run was trained with")
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise UserError(f"--eta {self.eta}: choose from 0 to 1, with --sampler ddim")
        if self.v_posterior is not None and not 0 <= self.v_posterior <= 1:
            raise UserError(f"--v-posterior {self.v_posterior}: choose from 0 to 1")
        if self.v_posterior is not None and self.sampler != "ddpm":
            raise UserError(f"--v-posterior is ddpm's variance, which {self.sampler} has not: add --sampler ddpm")
        if not told and self.guidance != 1:
            raise UserError(
                "this run knows no classes, which --guidance needs: train --preset quick-class, "
                "or set --guidance and --train.sample-guidance to 1, their intervals to None"
            )
        if told and not dropout and self.guidance != 1:
            raise UserError("this run was trained with --train.label-dropout 0, which leaves no room for --guidance")
        if not (0 <= self.guidance < np.inf and 0 <= self.guidance_rescale <= 1):
            raise UserError("--guidance must be at least 0, --guidance-rescale in [0, 1]")
        if self.guidance == 1 and (self.guidance_rescale or self.guidance_interval):
            raise UserError("--guidance-rescale and --guidance-interval change nothing without --guidance: give one, say 3")
        if self.guidance_interval and not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] < T:
            raise UserError(
                "--guidance-interval {} {}, or --train.sample-guidance-interval: ".format(*self.guidance_interval)
                + f"give two timesteps in 0 to {T - 1}, the lower one first"
            )

    def make_denoiser(self, net, diffusion, null: int | None, clip: bool = True):
        """The network's denoiser, guided where it is asked to be; `null` is the label that stands for none, `clip` keeps x_0
        in [-1, 1]."""
        if self.v_posterior is not None:
            diffusion.v_posterior = self.v_posterior
        denoise = make_denoiser(diffusion, net, clip=clip and self.guidance == 1)
        if self.guidance == 1:
            return denoise
        uncond = with_label(denoise, null)
        return guide(denoise, uncond, self.guidance, self.guidance_rescale, self.guidance_interval, clip)

    def make_sampler(self, self_condition: bool = False):
        """The sampler, a function as all in `samplers`."""
        sampler = partial(sample_ddim, eta=self.eta) if self.sampler == "ddim" else SAMPLERS[self.sampler]
        return self_conditioned(sampler) if self_condition else sampler

    def timesteps(self, diffusion) -> list[int]:
        spacing = self.spacing or ("linspace" if self.sampler in ("ddpm", "ddim") else "logsnr")
        return sampling_timesteps(diffusion.num_timesteps, self.steps, spacing, diffusion.alphas_cumprod)


def in_turn(config, num: int):
    """(labels, told): each class in turn, (num,) int32, and in a tuple what the network is told of them, these or captions;
    (None, ()) where it is told of none."""
    if config.classes is None:
        return None, ()
    labels = np.arange(num, dtype=np.int32) % config.classes
    return labels, (plain_captions(labels) if config.is_text else labels,)


def make_draw(sampling: Sampling, net, diffusion, config, first_stage=None):
    """draw(num, batch_size, callback=None) -> (images (num, C, H, W), labels): each class in turn. Of latents, `first_stage`
    decodes them."""
    denoise = sampling.make_denoiser(net, diffusion, config.model.null_label, clip=not config.is_latent)
    sampler, timesteps = sampling.make_sampler(config.model.self_condition), sampling.timesteps(diffusion)

    def draw(num: int, batch_size: int, callback=None):
        labels, told = in_turn(config, num)
        x = generate(sampler, denoise, diffusion, timesteps, config.shape, num, sampling.seed, batch_size, callback, told)
        return first_stage.decode(x) if first_stage else x, labels

    return draw
