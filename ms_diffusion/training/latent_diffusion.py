"""Trained runs, and the losses of an autoencoder, under the names that users of CompVis latent-diffusion know. Each method
is a few lines over the functions of this library.

Images (B, C, H, W) in [-1, 1] and latents (B, C, h, w) are arrays of float32 or Tensors, and results are arrays. A method
that draws random numbers takes a seed.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from ..denoiser import inpaint
from ..latent import in_patches
from ..losses import D_LOSSES, adaptive_weight, discriminator_loss, generator_loss, laplace_nll, reconstruction_error
from ..models.autoencoder import gaussian_kl, gaussian_mode, gaussian_nll, gaussian_sample, mean_and_logvar
from ..models.discriminator import NLayerDiscriminator
from ..runtime import UserError, compiled
from ..samplers import generate, sample_ddim, sample_ddpm
from .pipeline import load
from .runs import Run

Values = Any  # an array or a Tensor


def array(x: Values) -> np.ndarray:
    return x.asnumpy() if isinstance(x, Tensor) else np.asarray(x, np.float32)


def noise_like(x: np.ndarray, seed: Any) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(x.shape, np.float32)


def grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Images (n, C, H, W) at each of T steps -> one picture (C, n H, T W), a row for each image."""
    x = np.stack(rows, 1)
    n, steps, c, height, width = x.shape
    return x.transpose(2, 0, 3, 1, 4).reshape(c, n * height, steps * width)


class DiagonalGaussianDistribution:
    """N(mean, exp(logvar)) of z (B, C, h, w) from its moments (B, 2C, h, w); if `deterministic`, z is the mean."""

    def __init__(self, parameters: Values, deterministic: bool = False):
        self.parameters, self.deterministic = Tensor(array(parameters)), deterministic
        mean, logvar = mean_and_logvar(self.parameters)
        self.mean, self.logvar, factor = mean.asnumpy(), logvar.asnumpy(), 0 if deterministic else 1
        self.std, self.var = factor * np.exp(0.5 * self.logvar), factor * np.exp(self.logvar)

    def sample(self, seed: int = 0) -> np.ndarray:
        noise = Tensor(noise_like(self.mean, seed))
        return self.mode() if self.deterministic else gaussian_sample(self.parameters, noise).asnumpy()

    def mode(self) -> np.ndarray:
        return gaussian_mode(self.parameters).asnumpy()

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> np.ndarray:
        """KL divergence in nats from N(0, I), or from `other`: (B,), or 0 if it is deterministic."""
        if self.deterministic:
            return np.zeros(1, np.float32)
        return gaussian_kl(self.parameters, None if other is None else other.parameters).asnumpy()

    def nll(self, sample: Values) -> np.ndarray:
        """Negative log-density at a sample, in nats: (B,), or 0 if it is deterministic."""
        found = gaussian_nll(self.parameters, Tensor(array(sample))).asnumpy()
        return np.zeros(1, np.float32) if self.deterministic else found


class DDPM:
    """A trained run of images: `DDPM("runs/mine")`, or of a `Run`. `cond` holds the network's conditions in its order.
    Raises UserError if there is no such run, or it is not a diffusion's.

    Attributes:
        log_every_t: Timesteps between two images of a row."""

    def __init__(self, run: Run | str | Path, log_every_t: int = 100):
        self.run = run if isinstance(run, Run) else load(run)
        if self.run.diffusion is None:
            raise UserError(f"{self.run.name} is no diffusion model: give a run that was trained on pixels or latents")
        self.model, self.diffusion, self.log_every_t = self.run.net, self.run.diffusion, log_every_t
        self.num_timesteps, self.shape = self.diffusion.num_timesteps, self.run.task.shape
        self.channels, self.image_size = self.shape[0], self.shape[-1]

    @cached_property
    def graph(self) -> Callable:
        return compiled(self.model)

    def apply_model(self, x_noisy: Values, t: Values, cond: Any = ()) -> np.ndarray:
        """What the network predicts at timesteps t (B,)."""
        arrays = array(x_noisy), np.asarray(t, np.int32), *map(np.asarray, cond)
        return self.graph(*map(Tensor, arrays)).asnumpy()

    def q_sample(self, x_start: Values, t: Values, noise: Values = None, seed: int = 0) -> np.ndarray:
        """x_0 noised to timesteps t (B,)."""
        x_start = array(x_start)
        noise = noise_like(x_start, seed) if noise is None else array(noise)
        return self.diffusion.q_sample(*map(Tensor, (x_start, np.asarray(t, np.int32), noise))).asnumpy()

    def predict_start(self, output: Values, x_t: Values, t: Values) -> np.ndarray:
        """x_0 from what the network predicts."""
        x_start = self.diffusion.predict_start(*map(Tensor, (array(output), array(x_t), np.asarray(t, np.int32)))).asnumpy()
        return x_start.clip(-1, 1) if self.diffusion.clip_denoised else x_start

    def p_losses(
        self, x_start: Values, t: Values, noise: Values = None, cond: Any = (), seed: int = 0
    ) -> tuple[float, dict]:
        """The loss at timesteps t (B,), and {"loss_simple", "loss_vlb", "loss"}."""
        x_start, t, process = array(x_start), np.asarray(t, np.int32), self.diffusion
        noise = noise_like(x_start, seed) if noise is None else array(noise)
        targets = {"eps": lambda: Tensor(noise), "x0": lambda: Tensor(x_start)}
        targets["v"] = lambda: process.predict_v(*map(Tensor, (x_start, t, noise)))
        output = Tensor(self.apply_model(self.q_sample(x_start, t, noise), t, cond))
        error = process.loss(output, targets[process.objective]()).asnumpy().reshape(len(t), -1).mean(1)
        loss = float(((process.simple_weights[t] + process.elbo_weights[t]) * error).mean())
        vlb = float((process.lvlb_weights[t] * error).mean())
        return loss, {"loss_simple": float(error.mean()), "loss_vlb": vlb, "loss": loss}

    def denoiser(self, cond: Any, scale: float = 1.0, uncond: Any = None) -> Callable:
        """denoise(x_t, t) -> x_0, guided away from the condition `uncond` if the scale is not 1."""

        def denoise(x: Tensor, t: int) -> Tensor:
            times = np.full(x.shape[0], t, np.int32)
            output = self.apply_model(x, times, cond)
            if scale != 1:
                other = self.apply_model(x, times, uncond)
                output = other + scale * (output - other)
            return Tensor(self.predict_start(output, x, times))

        return denoise

    def draw(self, sampler: Callable, denoise: Callable, timesteps: Sequence[int], num: int, shape: Sequence[int],
            x_T: Values = None, mask: Values = None, x0: Values = None, seed: int = 0) -> tuple:  # fmt: skip
        """Samples, and x_T, each x and each x_0 on the way. Where `mask` is 1, x_0 is that of `x0`."""
        if mask is not None:
            denoise = inpaint(denoise, *(Tensor(array(a)) for a in (x0, mask)))
        x_T = np.stack([noise_like(np.empty(shape), (seed, i)) for i in range(num)]) if x_T is None else array(x_T)
        xs, starts = [x_T], []

        def watch(i: int, x: Tensor, x_start: Tensor) -> None:
            xs.append(x.asnumpy())
            starts.append(x_start.asnumpy())

        process = copy(self.diffusion)
        if sampler.func is sample_ddim:  # which ends at the first timestep in the original
            process.last_level = process.level(0)
        options = (process, list(timesteps), shape, num, seed, num, watch)
        return generate(sampler, denoise, *options, start=x_T), xs, starts

    def kept(self, steps: Sequence[Any], timesteps: Sequence[int]) -> list[Any]:
        """Those of steps that a row shows."""
        last = timesteps[0]
        return [step for step, t in zip(steps, timesteps, strict=True) if t % self.log_every_t == 0 or t == last]

    def sample(self, batch_size: int = 16, return_intermediates: bool = False, x_T: Values = None,
            timesteps: int | None = None, quantize_denoised: bool = False, mask: Values = None, x0: Values = None,
            shape: Sequence[int] | None = None, cond: Any = (), seed: int = 0) -> Any:  # fmt: skip
        """Ancestral samples (batch_size, C, H, W) from the first `timesteps` timesteps, by default all; with
        `return_intermediates` a list of x at some of them, too."""
        times = list(range(timesteps or self.num_timesteps))[::-1]
        sampler = partial(sample_ddpm, quantize=self.quantizer(quantize_denoised))
        how = sampler, self.denoiser(cond), times, batch_size, tuple(shape or self.shape)[-3:]
        x, xs, _ = self.draw(*how, x_T, mask, x0, seed)
        return (x, [xs[0], *self.kept(xs[1:], times)]) if return_intermediates else x

    def quantizer(self, wanted: bool) -> Callable | None:
        if wanted and not self.run.task.has_codebook:
            raise UserError("quantize_denoised is for latents of a VQ autoencoder: leave it out")
        return self.run.task.quantize if wanted else None

    def get_input(self, batch: dict[str, Any], N: int | None = None) -> np.ndarray:
        """The images of a batch {"image": (B, H, W, C) in [-1, 1]}, the first N."""
        return np.ascontiguousarray(array(batch["image"])[:N].transpose(0, 3, 1, 2))

    def diffusion_row(self, x_start: np.ndarray, decode: Callable = array, seed: int = 0) -> np.ndarray:
        """Images (n, ...) on their way to noise, a row each."""
        times = [t for t in range(self.num_timesteps) if t % self.log_every_t == 0 or t == self.num_timesteps - 1]
        return grid([decode(self.q_sample(x_start, np.full(len(x_start), t), None, seed + t)) for t in times])

    def log_images(self, batch: dict[str, Any], N: int = 8, n_row: int = 2, sample: bool = True,
            return_keys: Sequence[str] | None = None, seed: int = 0) -> dict[str, np.ndarray]:  # fmt: skip
        """{"inputs", "diffusion_row", "samples", "denoise_row"} of a batch: images (N, C, H, W), rows one picture each."""
        x = self.get_input(batch, N)
        log = {"inputs": x, "diffusion_row": self.diffusion_row(x[:n_row], seed=seed)}
        if sample:
            log["samples"], steps = self.sample(len(x), True, seed=seed)
            log["denoise_row"] = grid(steps)
        return {key: log[key] for key in return_keys or log}


class LatentDiffusion(DDPM):
    """A trained run of latents with its first stage: `LatentDiffusion("runs/latent")`. `cond` is what
    `get_learned_conditioning` returns, or {"c_concat": [...], "c_crossattn": [...]}, or None for an unconditional network.

    Attributes:
        patch: Side of overlapping patches of latents that `apply_model` works on one by one; by default whole latents."""

    def __init__(self, run: Run | str | Path, log_every_t: int = 100, patch: int | None = None):
        super().__init__(run, log_every_t)
        if (first_stage := getattr(self.run.task, "first_stage", None)) is None:
            raise UserError(f"{self.run.name} has no first stage: give a run of latents, or use DDPM")
        self.first_stage, self.first_stage_model, self.patch = first_stage, first_stage.net, patch
        self.scale_factor, self.condition = first_stage.scale, self.run.config.model.condition

    def encode_first_stage(self, x: Values) -> "DiagonalGaussianDistribution | np.ndarray":
        """The distribution of the images' latents, or of a VQModel the latents before quantization."""
        encoded = self.first_stage._encode(array(x))
        return encoded if self.first_stage.has_codebook else DiagonalGaussianDistribution(encoded)

    def get_first_stage_encoding(self, encoded: "DiagonalGaussianDistribution | Values", seed: int = 0) -> np.ndarray:
        """What is diffused: a sample of the distribution, or the latents, times the scale factor."""
        is_gaussian = isinstance(encoded, DiagonalGaussianDistribution)
        return np.float32(self.scale_factor) * (encoded.sample(seed) if is_gaussian else array(encoded))

    def decode_first_stage(self, z: Values, predict_cids: bool = False, force_not_quantize: bool = False) -> np.ndarray:
        """Latents -> images. With `predict_cids`, z are logits (B, n_embed, h, w) or ids (B, h, w) into a codebook."""
        if predict_cids:
            ids = np.asarray(z.asnumpy() if isinstance(z, Tensor) else z)
            return self.first_stage.decode_ids(ids.argmax(1) if ids.ndim == 4 else ids)
        if force_not_quantize and self.first_stage.has_codebook:
            return self.decode_unquantized(Tensor(array(z) / np.float32(self.scale_factor))).asnumpy()
        return self.first_stage.decode(array(z))

    @cached_property
    def decode_unquantized(self) -> Callable:
        model = self.first_stage_model

        def decode(z):
            return model.decode(z, True)

        return compiled(decode)

    def get_learned_conditioning(self, c: Any) -> np.ndarray:
        """Classes (B,), or {"class_label": classes}, or texts, or tokens (B, L) -> the context (B, L, dim); classes that are
        added to the time embedding are returned as they are."""
        c = c["class_label"] if isinstance(c, dict) else [c] if isinstance(c, str) else c
        if not isinstance(c, np.ndarray | Tensor) and isinstance(c[0], str):
            c = self.run.task.labelling.encode(list(c))
        rows = np.asarray(c.asnumpy() if isinstance(c, Tensor) else c)
        if self.model.cond_stage is None:
            return rows
        return self.encode_condition(Tensor(rows.astype(np.int32))).asnumpy()

    @cached_property
    def encode_condition(self) -> Callable:
        return compiled(self.model.cond_stage)

    @cached_property
    def graph(self) -> Callable:
        unet, is_adm = self.model.unet, self.condition == "adm"

        def graph(x, t, *cond):
            context = None if is_adm or not cond else cond[0]
            return unet(x, t, context, cond[0] if is_adm else None)

        return compiled(graph)

    def apply_model(self, x_noisy: Values, t: Values, cond: Any = None) -> np.ndarray:
        """What the network predicts at timesteps t (B,); in overlapping patches if `patch` is set."""
        if not isinstance(cond, dict):
            cond = {} if cond is None else {"c_crossattn": list(cond) if isinstance(cond, list) else [cond]}
        x = np.concatenate([array(x_noisy), *map(array, cond.get("c_concat", []))], 1)
        rest = cond.get("c_crossattn", [])
        if rest:
            is_adm = self.condition == "adm"
            rest = [np.asarray(rest[0], np.int32) if is_adm else np.concatenate([array(c) for c in rest], 1)]

        def whole(x: np.ndarray) -> np.ndarray:
            return self.graph(*map(Tensor, (np.ascontiguousarray(x), np.asarray(t, np.int32), *rest))).asnumpy()

        return whole(x) if self.patch is None else in_patches(whole, x, self.patch, max(self.patch // 2, 1), 1)

    def p_losses(self, x_start: Values, cond: Any, t: Values, noise: Values = None, seed: int = 0) -> tuple[float, dict]:
        return super().p_losses(x_start, t, noise, cond, seed)

    def sample(self, cond: Any = None, batch_size: int = 16, return_intermediates: bool = False, **options: Any) -> Any:
        return super().sample(batch_size, return_intermediates, cond=cond, **options)

    def sample_log(self, cond: Any, batch_size: int, ddim: bool = True, ddim_steps: int = 200, eta: float = 0.0,
            x_T: Values = None, mask: Values = None, x0: Values = None, quantize_denoised: bool = False,
            unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Any = None,
            seed: int = 0) -> tuple[np.ndarray, Any]:  # fmt: skip
        """Samples, and what lies on the way: of DDIM {"x_inter", "pred_x0"}, otherwise a list of x."""
        if not ddim:
            options = {"x_T": x_T, "quantize_denoised": quantize_denoised, "mask": mask, "x0": x0, "seed": seed}
            return self.sample(cond, batch_size, True, **options)
        T = self.num_timesteps
        times = np.minimum(np.arange(0, T, max(T // ddim_steps, 1)) + 1, T - 1)[::-1].tolist()
        sampler = partial(sample_ddim, eta=eta, quantize=self.quantizer(quantize_denoised))
        denoise = self.denoiser(cond, unconditional_guidance_scale, unconditional_conditioning)
        x, xs, starts = self.draw(sampler, denoise, times, batch_size, self.shape, x_T, mask, x0, seed)
        every = [i for i in range(len(times)) if (len(times) - i - 1) % self.log_every_t == 0 or i == 0]
        return x, {"x_inter": [xs[0], *(xs[i + 1] for i in every)], "pred_x0": [xs[0], *(starts[i] for i in every)]}

    def progressive_denoising(self, cond: Any, shape: Sequence[int] | None = None, batch_size: int = 16, x_T: Values = None,
            quantize_denoised: bool = False, mask: Values = None, x0: Values = None,
            seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:  # fmt: skip
        """Ancestral samples, and the predicted x_0 at some of the timesteps."""
        times = list(range(self.num_timesteps))[::-1]
        sampler = partial(sample_ddpm, quantize=self.quantizer(quantize_denoised))
        how = sampler, self.denoiser(cond), times, batch_size, tuple(shape or self.shape)[-3:]
        x, _, starts = self.draw(*how, x_T, mask, x0, seed)
        return x, self.kept(starts, times)

    def log_images(self, batch: dict[str, Any], N: int = 8, n_row: int = 4, sample: bool = True,
            ddim_steps: int | None = 200, ddim_eta: float = 1.0, return_keys: Sequence[str] | None = None,
            quantize_denoised: bool = True, inpaint: bool = True, plot_denoise_rows: bool = False,
            plot_progressive_rows: bool = True, plot_diffusion_rows: bool = True,
            seed: int = 0) -> dict[str, np.ndarray]:  # fmt: skip
        """Pictures of a batch {"image", and "class_label" or "caption"}: "inputs" and their "reconstruction", the
        "diffusion_row", "samples" with their "denoise_row", those with x_0 of the codebook ("samples_x0_quantized"), those
        that fill in the centre of the inputs ("samples_inpainting") or what is around it ("samples_outpainting") with the
        "mask", and the x_0 of progressive denoising ("progressive_row"). Images are (N, C, H, W), rows one picture each."""
        x = self.get_input(batch, N)
        z = self.get_first_stage_encoding(self.encode_first_stage(x), seed)
        named = next((batch[key][: len(x)] for key in ("class_label", "caption") if key in batch), None)
        cond = None if named is None or self.condition == "none" else self.get_learned_conditioning(named)
        how = {"cond": cond, "batch_size": len(x), "ddim": ddim_steps is not None, "ddim_steps": ddim_steps or 0}
        draw, decode = partial(self.sample_log, **how, eta=ddim_eta, seed=seed), self.decode_first_stage
        log = {"inputs": x, "reconstruction": decode(z)}
        if plot_diffusion_rows:
            log["diffusion_row"] = self.diffusion_row(z[:n_row], decode, seed)
        if sample:
            samples, steps = draw()
            log["samples"] = decode(samples)
            if plot_denoise_rows:
                log["denoise_row"] = grid([decode(x) for x in (steps["x_inter"] if isinstance(steps, dict) else steps)])
            if quantize_denoised and self.first_stage.has_codebook:
                log["samples_x0_quantized"] = decode(draw(quantize_denoised=True)[0])
            if inpaint:
                height, width = z.shape[2:]
                mask = np.ones((len(x), 1, height, width), np.float32)
                mask[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0
                log["mask"], log["samples_inpainting"] = mask, decode(draw(x0=z, mask=mask)[0])
                log["samples_outpainting"] = decode(draw(x0=z, mask=1 - mask)[0])
        if plot_progressive_rows:
            log["progressive_row"] = grid([decode(x) for x in self.progressive_denoising(cond, None, len(x), seed=seed)[1]])
        return {key: log[key] for key in return_keys or log}


class LPIPSWithDiscriminator:
    """The losses of an autoencoder and of its discriminator for a batch; a run trains with the same (losses.py).

    Args:
        perceptual_loss: distance(x, y) -> (B,), such as `load_lpips` returns; None: leave it out.
        The others are the original's.

    Attributes:
        discriminator, logvar: What is trained beside the autoencoder."""

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, pixelloss_weight: float = 1.0,
            disc_num_layers: int = 3, disc_in_channels: int = 3, disc_factor: float = 1.0, disc_weight: float = 1.0,
            perceptual_weight: float = 1.0, use_actnorm: bool = False, disc_loss: str = "hinge",
            perceptual_loss: Callable | None = None):  # fmt: skip
        norm = "act" if use_actnorm else "batch"
        self.discriminator = NLayerDiscriminator(disc_in_channels, 64, disc_num_layers, norm)
        self.logvar = Parameter(Tensor(np.float32(logvar_init)), name="logvar")
        self.start, self.kl_weight, self.pixel_weight, self.disc_weight = (
            disc_start,
            kl_weight,
            pixelloss_weight,
            disc_weight,
        )
        self.disc_factor, self.d_loss = disc_factor, D_LOSSES[disc_loss]
        self.perceptual_loss, self.perceptual_weight = perceptual_loss, perceptual_weight

    def nll(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and mean error of each image, (B,)."""
        perceptual: Any = 0.0
        if self.perceptual_loss and self.perceptual_weight:
            perceptual = self.perceptual_weight * self.perceptual_loss(inputs, reconstructions)
        error = reconstruction_error(inputs, reconstructions, perceptual, pixel_weight=self.pixel_weight)
        return laplace_nll(error, self.logvar, inputs.size // inputs.shape[0]), error

    def judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        return self.discriminator(images if cond is None else ops.concat((images, cond), 1))

    def calculate_adaptive_weight(self, inputs: Tensor, last_layer: tuple, cond: Tensor | None = None) -> Tensor:
        """The weight of the discriminator, from the gradients at the decoder's last layer: `last_layer` is the decoder, and
        the features (`Decoder.features`) that the reconstructions are made of."""
        decoder, features = last_layer
        weights = [decoder.conv_out.weight]
        nll = ms.grad(lambda h: self.nll(inputs, decoder.last(h))[0].mean(), None, weights)(features)[0]
        g_loss = ms.grad(lambda h: generator_loss(self.judge(decoder.last(h), cond)), None, weights)(features)[0]
        return adaptive_weight(nll, g_loss, self.disc_weight)

    def __call__(self, inputs: Values, reconstructions: Values, posteriors: DiagonalGaussianDistribution, optimizer_idx: int,
            global_step: int, last_layer: tuple | None = None, cond: Values = None,
            split: str = "train") -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """The loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and what the original logs. Without
        `last_layer` the discriminator has no weight in the autoencoder's loss."""
        x, reconstruction = Tensor(array(inputs)), Tensor(array(reconstructions))
        cond, factor = None if cond is None else Tensor(array(cond)), self.disc_factor * (global_step >= self.start)
        if optimizer_idx == 1:
            real, fake = self.judge(x, cond), self.judge(reconstruction, cond)
            loss = discriminator_loss(real, fake, factor, self.d_loss)
            log = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        else:
            (nll, error), g_loss = self.nll(x, reconstruction), generator_loss(self.judge(reconstruction, cond))
            kl = gaussian_kl(posteriors.parameters).mean()
            d_weight: Any = 0.0
            if last_layer and self.disc_factor:
                d_weight = self.calculate_adaptive_weight(x, last_layer, cond)
            loss = nll.mean() + self.kl_weight * kl + d_weight * factor * g_loss
            log = {
                "total_loss": loss,
                "logvar": self.logvar,
                "kl_loss": kl,
                "nll_loss": nll.mean(),
                "rec_loss": error.mean(),
            }
            log |= {"d_weight": d_weight, "disc_factor": factor, "g_loss": g_loss}
        return loss, {f"{split}/{name}": float(value) for name, value in log.items()}
