"""How samples are drawn from a network: the options of sampling, guidance around the denoiser, and `sample()`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from mindspore import nn

from .denoiser import guide, make_denoiser, self_conditioned, with_label
from .fields import AT_LEAST_1, FRACTION, NON_NEGATIVE, POSITIVE, OneOf, as_value, check_fields
from .process import Process
from .runtime import DEVICES, UserError, command
from .samplers import SAMPLERS, SPACINGS, default_spacing, generate, sampler_options, sampling_timesteps

SAMPLER_OPTIONS = ("eta", "v_posterior", "quantize_denoised", "s_churn", "s_tmin", "s_tmax", "s_noise")

SAMPLER, STEPS = "ddim", 50  # of whoever names none


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    seed: Annotated[int, NON_NEGATIVE] = 0
    """Seed. Sample i of a seed is the same whatever the number of samples and the batch size."""
    sampler: Annotated[str, OneOf(SAMPLERS)] | None = None
    """ddpm, sde_dpmpp_2m and euler_ancestral add noise at each step; consistency is for runs with --train.consistency, and
    their default; the others are deterministic. dpmpp_2m and unipc need 10 to 15 steps. euler is another name of ddim. By
    default ddim, and dpmpp_2m for scores."""
    steps: Annotated[int, AT_LEAST_1] | None = None
    """Sampling steps, at most the number of timesteps. Each step calls the network once (heun and midpoint: twice). By
    default 50, and 20 for scores, or the --train.sample-steps of a run with --train.consistency."""
    spacing: Literal[SPACINGS] | None = None
    """Spacing of the timesteps; by default linspace for ddpm and ddim (euler), logsnr for the others."""
    eta: Annotated[float, FRACTION] | None = None
    """Noise of ddim and euler_ancestral, from 0 (none, as ddim by default) to 1 (that of ddpm, as euler_ancestral)."""
    v_posterior: Annotated[float, FRACTION] | None = None
    """Fraction of beta in ddpm's variance; by default the run's."""
    guidance: Annotated[float, NON_NEGATIVE] | None = None
    """Scale of classifier-free guidance: 0 ignores the class, 1 is the plain conditional network, larger values sharpen.
    By default the run's --train.sample-guidance."""
    guidance_rescale: Annotated[float, FRACTION] = 0.0
    """How far the guided x_0 is scaled back to the contrast that it has without guidance."""
    guidance_interval: tuple[int, int] | None = None
    """First and last timestep at which guidance is applied; by default all, or the run's interval with its guidance."""
    quantize_denoised: bool = False
    """In each step of ddpm, ddim, euler_ancestral or plms, take the nearest entries of the codebook in place of x_0. For
    latents of a VQ autoencoder."""
    batch_size: Annotated[int, AT_LEAST_1] | None = None
    """Samples per batch; by default 64 images, or all points."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of the network: their moving average, or as trained."""
    ema_length: float | None = None
    """Length of another average, chosen after training, for a run with --train.ema-lengths: 0.1 is a tenth of the run."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    s_churn: Annotated[float, NON_NEGATIVE] = 0.0
    """Noise that all steps of heun together add and remove (EDM, algorithm 2): 0 is none, 20 to 80 are usual."""
    s_tmin: Annotated[float, NON_NEGATIVE] = 0.0
    """Least sigma / alpha at which --s-churn adds noise."""
    s_tmax: Annotated[float, POSITIVE] | None = None
    """Largest sigma / alpha at which --s-churn adds noise; by default any."""
    s_noise: Annotated[float, POSITIVE] = 1.0
    """Standard deviation of the noise of --s-churn; slightly above 1 makes up for details that the network loses."""

    @property
    def function(self) -> Callable:
        """The sampler."""
        return SAMPLERS[self.sampler or SAMPLER]

    def resolve(self, task: Any, sampler: str = SAMPLER, steps: int = STEPS) -> "Sampling":
        """These options with the defaults of the run of `task`, a `training.tasks.diffusion.DiffusionTask`, filled in, and
        with this sampler and number of steps where neither they nor the run say any. Raises UserError if an option is out
        of range, or does not fit the run or another option."""
        check_fields(self)
        train, T = task.config.train, task.config.diffusion.num_timesteps
        if getattr(train, "consistency", ()) and self.sampler in (None, "consistency"):
            sampler, steps = "consistency", train.sample_steps
        options = replace(self, sampler=self.sampler or sampler, steps=self.steps or steps)
        if self.guidance is None:
            interval = self.guidance_interval or getattr(train, "sample_guidance_interval", None)
            options = replace(options, guidance=getattr(train, "sample_guidance", 1.0), guidance_interval=interval)
        options.check(T)
        if options.guidance != 1 and task.null_label is None:
            flag = "--train.sample-guidance" if self.guidance is None else "--guidance"
            raise UserError(
                f"{flag} is {options.guidance:g}, but this run has no classes: leave it out, or train with classes "
                f"({command('train')} --preset quick-class)"
            )
        if options.guidance != 1 and not train.label_dropout:
            raise UserError(
                "this run was trained with --train.label-dropout 0, so it has no unconditional network: leave out --guidance"
            )
        if self.quantize_denoised and not task.has_codebook:
            raise UserError("--quantize-denoised is for runs on latents of a VQ autoencoder: leave it out")
        return options

    def check(self, num_timesteps: int) -> None:
        """Refuse options that do not fit each other or the number of timesteps."""
        if self.steps is not None and self.steps > num_timesteps:
            raise UserError(f"--steps is {self.steps}: choose from 1 to {num_timesteps}, the run's number of timesteps")
        known = sampler_options(self.function)
        for name in SAMPLER_OPTIONS:
            option = name.removesuffix("_denoised")
            if option not in known and getattr(self, name) != getattr(Sampling, name):
                takers = [key for key, sampler in SAMPLERS.items() if option in sampler_options(sampler)]
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} is an option of {', '.join(takers)}, not of {self.sampler or SAMPLER}: leave it out"
                )
        if not self.s_churn and (self.s_tmin, self.s_tmax, self.s_noise) != (0, None, 1):
            raise UserError("--s-tmin, --s-tmax and --s-noise need --s-churn: set it to 40, for example")
        if self.s_tmax is not None and self.s_tmax < self.s_tmin:
            raise UserError(f"--s-tmin is {self.s_tmin:g}, above --s-tmax {self.s_tmax:g}: give the lower first")
        if self.guidance in (None, 1) and (self.guidance_rescale or self.guidance_interval):
            raise UserError("--guidance-rescale and --guidance-interval need --guidance: set it to 3, for example")
        (first, last), most = self.guidance_interval or (0, 0), num_timesteps - 1
        if not 0 <= first <= last <= most:
            raise UserError(f"--guidance-interval is {first} {last}: give two timesteps in 0..{most}, the lower first")

    def make_sampler(self) -> Callable:
        """The sampler with its options set."""
        given = {name: getattr(self, name, None) for name in sampler_options(self.function)}
        return partial(self.function, **{name: value for name, value in given.items() if value is not None})

    def timesteps(self, diffusion: Process) -> list[int]:
        """The timesteps of the sampler's steps, descending."""
        spacing = default_spacing(self.function)
        spacing = self.spacing or (diffusion.spacing if spacing == Process.spacing else spacing)
        T, tables = diffusion.num_timesteps, (diffusion.alphas_cumprod, diffusion.steps_offset)
        return sampling_timesteps(T, self.steps or STEPS, spacing, *tables)


class Generator:
    """A network and its process, ready to draw samples; its graphs are compiled once.

    Args:
        shape: Shape of one sample, (C, H, W) or (2,).
        null_label: The label for "no class", or a row of another first condition, which guidance needs.
        self_condition: Whether the network takes its last x_0.

    Attributes:
        quantize: x_0 -> the x_0 that `Sampling.quantize_denoised` takes instead; None where there is no codebook."""

    quantize: Callable | None = None

    def __init__(self, net: nn.Cell, diffusion: Process, shape: Sequence[int], null_label: Any = None,
            self_condition: bool = False):  # fmt: skip
        self.net, self.diffusion, self.shape = net, diffusion, tuple(shape)
        self.null_label, self.self_condition = null_label, self_condition
        self.batch_size = 64 if len(self.shape) > 1 else None  # by default; None: all samples
        self._denoisers: dict[bool, Callable] = {}

    def raw_denoiser(self, clip: bool) -> Callable:
        """denoise(x_t, t, *cond) -> x_0 without guidance, clipped to [-1, 1] or not."""
        if clip not in self._denoisers:
            self._denoisers[clip] = make_denoiser(self.diffusion, self.net, clip=clip)
        return self._denoisers[clip]

    def denoiser(self, sampling: Sampling, null: Any = None) -> Callable:
        """denoise(x_t, t, *cond) -> x_0 with the guidance of these options, away from `null` in place of the null label."""
        clip, scale = self.diffusion.clip_denoised, 1.0 if sampling.guidance is None else sampling.guidance
        if scale == 1:
            return self.raw_denoiser(clip)
        null = self.null_label if null is None else null
        if null is None:
            raise UserError(f"guidance is {scale:g}, but there is no null_label: leave it out, or give that label")
        raw, options = self.raw_denoiser(False), (sampling.guidance_rescale, sampling.guidance_interval)
        return guide(raw, with_label(raw, null), scale, *options, clip)

    def draw(self, sampling: Sampling, num: int, cond: Sequence[np.ndarray] = (), callback: Callable | None = None,
            start: np.ndarray | None = None, timesteps: list[int] | None = None, denoise: Callable | None = None,
            sampler: Callable | None = None, null: Any = None) -> np.ndarray:  # fmt: skip
        """`num` samples (num, *shape) float32.

        Args:
            cond: The network's conditions in its order, arrays (num, ...).
            callback: callback(i, x, x_start) after each step.
            start: The first x (num, *shape), at the noise level of the first timestep; by default noise.
            timesteps, denoise, sampler: Replace those of `sampling`.
            null: A row of the first condition, such as a negative prompt's, in place of `null_label`."""
        sampler, denoise = sampler or sampling.make_sampler(), denoise or self.denoiser(sampling, null)
        if sampling.quantize_denoised:
            if self.quantize is None or "quantize" not in sampler_options(sampler):
                raise UserError("there is no codebook for --quantize-denoised, or this sampler takes none: leave it out")
            sampler = partial(sampler, quantize=self.quantize)
        sampler = self_conditioned(sampler) if self.self_condition else sampler
        timesteps = timesteps or sampling.timesteps(self.diffusion)
        size = num, sampling.seed, sampling.batch_size or self.batch_size or num
        return generate(sampler, denoise, self.diffusion, timesteps, self.shape, *size, callback, cond, start)


def sample(net: nn.Cell, diffusion: Process, shape: Sequence[int], num: int = 64, *,
        cond: Sequence[np.ndarray] = (), null_label: int | None = None, self_condition: bool = False,
        callback: Callable | None = None, **options: Any) -> np.ndarray:  # fmt: skip
    """`num` samples (num, *shape) float32 from any network net(x_t, t, *cond) that predicts what `diffusion` says.
    Raises UserError if an option is unknown or out of range.

    Args:
        cond: Conditions in the network's order, arrays (num, ...); with guidance, labels come first.
        null_label: The label for "no class", needed with guidance other than 1.
        self_condition: Whether the network takes its last x_0 after the conditions.
        callback: callback(i, x, x_start) after each step.
        options: Fields of `Sampling`: sampler, steps, seed, guidance, batch_size, ..."""
    sampling = sampling_from(options)
    check_fields(sampling)
    if num < 1:
        raise UserError(f"num is {num}: it must be at least 1")
    sampling.check(diffusion.num_timesteps)
    return shared_generator(net, diffusion, tuple(shape), null_label, self_condition).draw(sampling, num, cond, callback)


def shared_generator(net: nn.Cell, *options: Any) -> Generator:
    """`Generator(net, *options)`, or the one that the last call with the same arguments has made, with its graphs: the
    network keeps it, so both are freed together."""
    last = vars(net).get("_generator")
    if last is None or last[0] != options:
        last = vars(net)["_generator"] = options, Generator(net, *options)
    return last[1]


def sampling_from(options: dict[str, Any]) -> Sampling:
    """`Sampling` from keyword arguments. Raises UserError if one of them is not a field of it."""
    names = [field.name for field in fields(Sampling)]
    if unknown := [name for name in options if name not in names]:
        raise UserError(f"unknown option {unknown[0]!r}: choose from {', '.join(names)}")
    return Sampling(**{name: as_value(value) for name, value in options.items()})
