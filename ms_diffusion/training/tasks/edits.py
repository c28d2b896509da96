"""Edits of images with a run of pixels or of latents: inpainting, image to image, interpolation, and image conditions.

An edit works on x, which the process diffuses: `task.encode` makes it of images, and `task.decode` makes images of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mindspore import Tensor

from ... import images
from ...data.conditions import masked, reduced
from ...data.picture_files import read_image
from ...denoiser import inpaint, with_self_conditioning
from ...editing import invert_ddim, sample_repaint, slerp
from ...runtime import UserError
from ...samplers import SAMPLERS, SeededNoise, is_stochastic
from ...sampling import Sampling
from ..runs import Run
from .base import Arrays, Request

EDITS = ("inpaint", "interpolate", "init")


@dataclass
class Plan:
    """How the grid of a request is drawn."""

    num: int
    sampling: Sampling
    cond: Arrays
    labels: np.ndarray | None = None  # classes (num,) of the samples, if they have any
    columns: int | None = None
    gif_columns: int | None = None
    scale: int = 2
    captions: list[str] | None = None
    timesteps: list[int] = field(default_factory=list)
    start: np.ndarray | None = None
    denoise: Callable | None = None
    sampler: Callable | None = None
    null: np.ndarray | None = None  # the row of a negative prompt
    calls_per_step: int = 1
    paste: Callable[[np.ndarray], np.ndarray] = lambda x: x  # puts what an edit must not change into decoded samples
    arrange: Callable[[np.ndarray], np.ndarray] = lambda x: x  # from the samples (num, C, H, W) to the images of the grid


def plan(task: Any, run: Run, request: Request) -> Plan:
    """How an ImageTask draws a request. Raises UserError if the request does not fit the run or an image cannot be read."""
    check(task, request)
    chosen = next((name for name in EDITS if getattr(request, name)), None)
    if chosen is None:
        made = task.plan_grid(run, request)
        if "cond_image" in task.cond_fields:
            show_conditions(task, request, made)
        return made

    # Without a class or a prompt there is no direction to guide in, and a guided inversion does not lead back
    sampling, num, is_free = request.sampling, request.num or 8, not is_described(request)
    if sampling.guidance is None and (chosen == "interpolate" or is_free):
        sampling = replace(sampling, guidance=1.0)
    sampling = sampling.resolve(task)
    cond = task.no_conditions(num) if is_free else task.class_conditions(num, request.class_, request.prompt)
    made = Plan(num, sampling, cond, scale=4, null=task.negative(request.negative_prompt, sampling))
    made.labels = None if request.class_ is None else task.labelling.label_array(request.class_, num)
    strength = request.strength or (0.6 if chosen == "init" else 1)
    limit = strength * run.diffusion.num_timesteps
    made.timesteps = [t for t in sampling.timesteps(run.diffusion) if t < limit]
    if not made.timesteps:
        raise UserError(f"--strength {strength} leaves none of the {sampling.steps} steps: raise one of them")
    {"inpaint": plan_inpaint, "interpolate": plan_interpolate, "init": plan_init}[chosen](task, run, request, made)
    return made


def is_described(request: Request) -> bool:
    return request.class_ is not None or request.prompt is not None


def check(task: Any, request: Request) -> None:
    chosen = [name for name in EDITS if getattr(request, name)]
    condition, sampling = task.config.data.condition, request.sampling
    if len(chosen) > 1:
        raise UserError(f"choose one of --{' and --'.join(chosen)}")
    has_null = task.null_label is not None and task.config.train.label_dropout
    if chosen and task.labelling.field and not has_null and not is_described(request):
        raise UserError("this run was trained with --train.label-dropout 0, so an edit needs a --class or a --prompt")
    if condition != "none" and chosen and (condition, *chosen) != ("mask", "inpaint"):
        raise UserError(f"this run is conditioned on images ({condition}): use --image, not --{chosen[0]}")
    if condition == "none" and request.image:
        raise UserError("this run has no image condition, which --image needs: edit with --init, --inpaint or --interpolate")
    if request.strength is not None and not (0 < request.strength <= 1 and chosen):
        raise UserError(f"--strength is {request.strength}: it must be in (0, 1], with --{', --'.join(EDITS)}")
    if request.resample < 1 or (request.resample > 1 and not request.inpaint):
        raise UserError(f"--resample is {request.resample}: it must be at least 1, with --inpaint")
    if request.resample > 1 and sampling.sampler != "ddpm":
        raise UserError(f"--resample needs the steps of ddpm, not of {sampling.sampler}: add --sampler ddpm")
    noisy = [name for name, sampler in SAMPLERS.items() if is_stochastic(sampler)]
    if request.interpolate and (sampling.sampler in noisy or sampling.eta or sampling.s_churn or sampling.steps < 2):
        refused = f"not {', '.join(noisy)}; no --eta, no --s-churn"
        raise UserError(f"--interpolate needs a deterministic sampler ({refused}) and at least 2 --steps")


def show_conditions(task: Any, request: Request, made: Plan) -> None:
    """The conditions of the images of --image, or of test images; each sample stands between condition and original."""
    num = made.num
    originals = read_images(task, request.image) if request.image else images.to_float(task.test_images()[:num])
    originals = originals[np.arange(num) % len(originals)]
    shown = task.cond_image(originals, np.random.default_rng(made.sampling.seed))
    made.cond["cond_image"] = task.encode_condition(shown)
    made.arrange = lambda x: between(shown, x, originals)
    made.columns, made.scale, made.captions = 12 if num > 3 else 3, 2, None


def between(shown: np.ndarray, x: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Samples x (N, C, H, W), each between the image that conditions it and the original: (3 N, C, H, W)."""
    visible = np.broadcast_to(shown[:, : x.shape[1]], x.shape)  # a gray condition has one channel
    return np.stack([visible, x, originals], 1).reshape(-1, *x.shape[1:])


def plan_inpaint(task: Any, run: Run, request: Request, made: Plan) -> None:
    assert request.inpaint
    mask, image = request.inpaint
    original, known = read_images(task, [image]), read_mask(task, mask, image)
    x, kept = task.encode(original), reduced(known, task.shape[1:], np.min)
    if request.strength is not None:
        made.start = noised(task, run, x, made)
    if "cond_image" in task.cond_fields:
        made.cond["cond_image"] = task.encode_condition(masked(original, 1 - 2 * known)).repeat(made.num, 0)
    else:
        made.denoise = inpaint(run.generator.denoiser(made.sampling, made.null), Tensor(x), Tensor(kept))
    if request.resample > 1:
        made.sampler, made.calls_per_step = partial(sample_repaint, jump_n_sample=request.resample), request.resample
        if made.sampling.v_posterior is not None:
            made.sampler = partial(made.sampler, v_posterior=made.sampling.v_posterior)
    made.paste = lambda x: known * original + (1 - known) * x
    made.arrange, made.columns = lambda x: np.concatenate([original, original * known, x]), min(made.num + 2, 12)


def plan_init(task: Any, run: Run, request: Request, made: Plan) -> None:
    original = read_images(task, [request.init])
    made.start = noised(task, run, task.encode(original), made)
    made.arrange, made.columns = lambda x: np.concatenate([original, x]), min(made.num + 1, 12)


def noised(task: Any, run: Run, x: np.ndarray, made: Plan) -> np.ndarray:
    """x (1, ...) with the noise of the first step, another noise for each sample: (num, ...)."""
    t = Tensor(np.full(made.num, made.timesteps[0], np.int32))
    noise = SeededNoise(made.sampling.seed, range(made.num))(task.shape)
    return run.diffusion.q_sample(Tensor(x.repeat(made.num, 0)), t, Tensor(noise)).asnumpy()


def plan_interpolate(task: Any, run: Run, request: Request, made: Plan) -> None:
    assert request.interpolate
    original = read_images(task, request.interpolate)
    cond = [Tensor(values[:1].repeat(2, 0)) for values in task.in_order(made.cond)]
    denoise, x = run.generator.denoiser(made.sampling, made.null), Tensor(task.encode(original))
    denoise = with_self_conditioning(denoise) if task.self_condition else denoise
    first, last = invert_ddim(lambda x, t: denoise(x, t, *cond), x, run.diffusion, made.timesteps).asnumpy()
    made.start = np.stack([slerp(first, last, share) for share in np.linspace(0, 1, made.num)])

    def arrange(x: np.ndarray) -> np.ndarray:
        errors = rms(x[0], original[0]), rms(x[-1], original[1])
        print("reconstruction error of both ends (RMS in [-1, 1]): {:.3f}, {:.3f}".format(*errors))
        return np.concatenate([original[:1], x, original[1:]])

    made.arrange, made.columns = arrange, min(made.num + 2, 12)


def read_images(task: Any, names: Any, channels: int | None = None) -> np.ndarray:
    """Files, or test:N for the run's test image N -> (N, C, H, W) in [-1, 1]. Raises UserError if one cannot be read."""
    channels = int(channels or task.config.model.channels)
    test = task.test_images() if any(name.startswith("test:") for name in names) else ()
    found = []
    for name in names:
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not (number.isdecimal() and int(number) < len(test)):
                raise UserError(f"{name}: the test set has the images test:0 to test:{len(test) - 1}")
            image = test[int(number)]
            found.append(image if image.shape[-1] == channels else image.mean(-1, keepdims=True).astype(np.uint8))
            continue
        try:
            found.append(read_image(name, task.image_size, channels, task.config.data.matte))
        except Exception as e:  # PIL's decoders raise anything on a damaged file
            raise UserError(f"{name} cannot be read as an image: {e}") from e
    return images.to_float(np.stack(found))


def read_mask(task: Any, name: str, image: str) -> np.ndarray:
    """(1, 1, H, W): 1 where the image is kept, 0 where it is repainted, which is white in the file."""
    size = height, width = task.image_size
    painted = {"left": np.s_[:, : width // 2], "right": np.s_[:, width // 2 :]}
    painted |= {"top": np.s_[: height // 2], "bottom": np.s_[height // 2 :]}
    painted["center"] = np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4]
    if name in painted:
        known = np.ones((1, 1, *size), np.float32)
        known[0, 0][painted[name]] = 0
        return known
    mask = read_images(task, [name], channels=1)
    shapes = [size if file.startswith("test:") else images.picture_size(file) for file in (name, image)]
    if shapes[0] != shapes[1]:
        raise UserError("the mask {} has {} x {} pixels, the image {} {} x {}".format(name, *shapes[0], image, *shapes[1]))
    return (mask < 0).astype(np.float32)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of a - b."""
    return math.sqrt(np.mean((a - b) ** 2))
