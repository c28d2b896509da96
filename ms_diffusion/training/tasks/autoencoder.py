"""The first stage of latent diffusion: an autoencoder and its discriminator, which are trained in turns (losses.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ... import images
from ...fields import AT_LEAST_1, DEPTH, NON_NEGATIVE, POSITIVE, Bounds
from ...images import to_float
from ...latent import FirstStage
from ...losses import (
    D_LOSSES,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l1,
    l2,
    laplace_nll,
    reconstruction_error,
)
from ...metrics.scores import Reference, Samples, choose
from ...models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    VQConfig,
    VQModel,
    codebook_use,
    gaussian_kl,
    gaussian_sample,
)
from ...models.classifier import load_classifier
from ...models.discriminator import NORMS, NLayerDiscriminator
from ...models.layers import Masks, RankMean
from ...models.lpips import classifier_distance, load_lpips
from ...randomness import Stream
from ...runtime import UserError, command, compiled, ranks
from ...sampling import Sampling
from ..checkpoint import Checkpoint
from ..config import Config, DataConfig, TrainConfig
from ..pack import make_pack
from ..runs import Run
from ..step import EMA, make_optimizer, make_train_step, make_undo, rows_of, stack_parts, to_device
from ..validation import Validation, in_batches_of
from .base import Arrays, Logged, Request, Scored, Task, load_initial_weights, set_precision
from .images import ImageData, Images, check_image_size

BETA = Bounds(0, 1, low_open=True, high_open=True)
PIXEL_LOSSES = {"l1": l1, "l2": l2}


@dataclass(frozen=True)
class AutoencoderTrainConfig(TrainConfig):
    """How an autoencoder is trained against a discriminator (Rombach et al. 2022, appendix G)."""

    adam_betas: tuple[Annotated[float, BETA], Annotated[float, BETA]] = (0.9, 0.999)
    """Adam's beta_1 and beta_2, also for the discriminator."""
    kl_weight: Annotated[float, NON_NEGATIVE] = 1e-6
    """Weight of the KL divergence of the latents from N(0, 1), where these are Gaussian."""
    codebook_weight: Annotated[float, NON_NEGATIVE] = 1.0
    """Weight of the codebook's loss, where the latents are quantized."""
    logvar_init: float = 0.0
    """Initial log-variance of the likelihood, which is learned where the latents are Gaussian."""
    pixel_loss: Literal[tuple(PIXEL_LOSSES)] = "l1"
    """Error of a pixel: absolute (l1) or squared (l2)."""
    pixel_weight: Annotated[float, NON_NEGATIVE] = 1.0
    """Weight of the error of the pixels."""
    perceptual_weight: Annotated[float, NON_NEGATIVE] = 1.0
    """Weight of LPIPS beside the error of the pixels; 0 disables it."""
    vgg: str | None = None
    """torchvision's VGG16 weights for LPIPS; by default, for gray images of 28 or 32 pixels, the classifier's stages."""
    lpips: str | None = None
    """The linear layers of LPIPS, from the lpips package."""
    disc_start: Annotated[int, NON_NEGATIVE] = 5000
    """The step from which the discriminator is trained and its loss counts."""
    disc_lr: Annotated[float, POSITIVE] = 1e-3
    """Initial learning rate of the discriminator; it decays as the autoencoder's does."""
    disc_weight: Annotated[float, NON_NEGATIVE] = 0.5
    """Weight of the discriminator, relative to the gradient of the likelihood; 0 trains without one."""
    disc_factor: Annotated[float, NON_NEGATIVE] = 1.0
    """Factor of the discriminator's losses."""
    disc_loss: Literal[tuple(D_LOSSES)] = "hinge"
    """Loss of the discriminator."""
    disc_channels: Annotated[int, AT_LEAST_1] = 32
    """Channels after the discriminator's first convolution."""
    disc_layers: Annotated[int, DEPTH] = 2
    """Number of the discriminator's convolutions with a norm."""
    disc_norm: Literal[tuple(NORMS)] = "batch"
    """Norm of the discriminator."""


@dataclass(frozen=True)
class AutoencoderRunConfig(ImageData, Config):
    """A run of an autoencoder."""

    data: DataConfig = field(default_factory=lambda: DataConfig(size=32, flip=False))
    model: AutoencoderConfig | VQConfig = field(default_factory=AutoencoderConfig)
    train: AutoencoderTrainConfig = field(default_factory=AutoencoderTrainConfig)

    kind = "autoencoder"

    def task(self, data: Any = None) -> "AutoencoderTask":
        return AutoencoderTask(self, data)

    def check(self) -> None:
        super().check()
        data, train = self.data, self.train
        check_image_size(data.size, self.model.size_multiple, "data.size")
        if data.condition != "none":
            raise UserError(f"--data.condition {data.condition} is for networks in pixel space: leave it out")
        if (found := self.model.out_channels) not in (None, self.model.channels):
            raise UserError(f"--model.out-channels is {found}: reconstructions have the images' channels: leave it out")
        if train.disc_weight and data.size // 2**train.disc_layers < 3:
            raise UserError(f"--train.disc-layers is {train.disc_layers}: too many for images of {data.size} pixels")
        if train.accumulate > 1 and train.disc_weight and train.disc_norm == "batch":
            what = f"--train.accumulate is {train.accumulate}: the discriminator's batch norms would see parts of the batch"
            raise UserError(f"{what}: add --train.disc-norm act, or set --train.disc-weight to 0")
        if bool(train.vgg) != bool(train.lpips):
            raise UserError("LPIPS needs both --train.vgg and --train.lpips")


class AutoencoderTask(Images, Task):
    """An AutoencoderKL or a VQModel on images, with LPIPS and a discriminator of patches."""

    config: AutoencoderRunConfig

    def __init__(self, config: AutoencoderRunConfig, data: Any = None):
        super().__init__(config, data)
        self.flip = config.data.flip
        side = config.data.size // config.model.size_multiple
        self.latent_shape = (config.model.embed_dim, side, side)

    def make_networks(self, device: str) -> None:
        config, train = self.config, self.config.train
        net, _ = self.build()
        self.discriminator, parameters, self.scaler = None, [], set_precision(config.precision, net)
        net.decoder.conv_out.compute_type = ms.float32  # its gradients, which `weigh` compares, are beyond float16
        load_initial_weights(config, self.run_dir, net)
        self.objective = OBJECTIVES[type(net)](net, train)
        adam = {"decay": train.lr_decay, "adam_betas": train.adam_betas}
        schedule = train.lr, train.warmup_steps, train.total_steps
        extra = self.objective.parameters
        self.optimizer = make_optimizer(net, *schedule, extra_parameters=extra, name=train.optimizer, **adam)
        ema = EMA(net, train.ema_decay)
        net.set_train()
        if train.disc_weight:
            d_steps = max(train.total_steps - train.disc_start, 1)
            layers = train.disc_channels, train.disc_layers, train.disc_norm
            self.discriminator = NLayerDiscriminator(config.model.channels, *layers, train.seed)
            d_optimizer = self.d_optimizer = make_optimizer(self.discriminator, train.disc_lr, 0, d_steps, **adam)
            self.d_scaler = set_precision(config.precision, self.discriminator)
            both = [*self.discriminator.get_parameters(), *d_optimizer.get_parameters()]
            both += [self.d_scaler.scale_value, self.d_scaler.counter] if self.d_scaler else []
            parameters = list({id(p): p for p in both}.values())
            for p in parameters:  # the names in a checkpoint must differ
                p.name = f"discriminator.{p.name}"
        kept = {"keep": train.keep_checkpoints, "loss_scaler": self.scaler, "extra_parameters": parameters}
        self.checkpoint = Checkpoint(self.run_dir, net, self.optimizer, ema, **kept)
        self.net, self.ema, self.average = net, ema, FirstStage(ema.net)

    def prepare(self) -> None:
        """The steps, compiled when first called: the first without the discriminator, until disc_start."""
        train, net, discriminator = self.config.train, self.net, self.discriminator
        self.masks = Masks(net, train.batch_size, (self.config.data.size,) * 2, train.accumulate)
        options = {"clip_norm": train.clip_norm, "world_size": self.world_size, "accumulate": train.accumulate}
        self.distance = perceptual_distance(self.config)
        losses = autoencoder_losses(net, discriminator, self.objective, self.distance, train)
        likelihood, adversarial, last_gradients, weigh, d_loss = losses
        pack = make_pack(net, self.optimizer)
        d_pack = make_pack(discriminator, self.d_optimizer) if discriminator else None
        self.packs = [each for each in (pack, d_pack) if each]
        self.to_device = to_device(bool(self.packs))
        generator = {"has_aux": True, "pack": pack, "loss_scaler": self.scaler, **options}
        generator |= {"weight_decay": train.weight_decay, "before_part": self.masks.use}
        self.likelihood_step = make_train_step(likelihood, self.optimizer, self.ema, **generator)
        if discriminator:
            self.weigh = by_parts(last_gradients, weigh, train.accumulate, self.masks.use)
            self.adversarial_step = make_train_step(adversarial, self.optimizer, self.ema, **generator)
            options |= {"pack": d_pack, "loss_scaler": self.d_scaler}
            self.discriminator_step = make_train_step(d_loss, self.d_optimizer, has_aux=True, **options)
            self.remember, self.undo = make_undo(discriminator.statistics)

    def draw_batch(self, x: np.ndarray, labels: np.ndarray, step: int) -> Arrays:
        if not self.net.needs_noise:
            return {"x": x}
        return {"x": x, "noise": self.random(step).standard_normal((len(x), *self.latent_shape), np.float32)}

    def advance(self, batch: Arrays, step: int) -> tuple[Tensor, Tensor, Logged]:
        train, (x, *noise) = self.config.train, self.to_device(*batch.values())
        self.masks.draw(train.seed, step, self.rank)
        logged: Logged = {(p.name,): p for p in self.objective.parameters}
        if not self.discriminator or step < train.disc_start:
            loss, norm, (_, numbers) = self.likelihood_step(x, *noise)
            return loss, norm, logged | {self.objective.logged: self.mean_of_parts(numbers)}
        if train.disc_norm == "act":
            self.discriminator.initialise(x)
        self.remember()
        weight = self.weigh(x, *noise)
        loss, norm, (reconstruction, numbers) = self.adversarial_step(x, *noise, weight=weight)
        d_loss, _, logits = self.discriminator_step(x, reconstruction.reshape(x.shape))
        self.undo(loss, d_loss)
        numbers, logits = self.mean_of_parts(numbers), self.mean_of_parts(logits)
        logged |= {(*self.objective.logged, "g_loss", "disc_factor"): numbers, ("d_weight",): weight}
        return loss, norm, logged | {("disc_loss",): d_loss, ("logits_real", "logits_fake"): logits}

    def make_validation(self) -> Validation:
        """The error of reconstructions, pixels and perception (`rec_loss`)."""
        train, x = self.config.train, to_float(self.held_images().images)
        batch, rng = {"x": x}, np.random.default_rng((train.seed, Stream.VALIDATION))
        if self.net.needs_noise:
            batch["noise"] = rng.standard_normal((len(x), *self.latent_shape), np.float32)
        return Validation(self.ema.net, self.make_held_loss, in_batches_of(train.batch_size, batch))

    def make_held_loss(self, net: Any) -> Callable:
        train, objective = self.config.train, OBJECTIVES[type(net)](net, self.config.train)
        likelihood = autoencoder_losses(net, None, objective, self.distance, train)[0]

        def loss_fn(x, noise=None):
            numbers = likelihood(x, noise)[1][1]
            return numbers[1]

        return loss_fn

    def mean_of_parts(self, numbers: Tensor) -> Tensor:
        """What a step returns of numbers (n,) to log -> (n,): the mean over the parts that --train.accumulate makes."""
        return numbers if self.config.train.accumulate == 1 else numbers.mean(0)

    def preview(self, step: int) -> Path:
        self.write_back()
        path = self.run_dir / "samples" / f"step-{step:07d}.png"
        return save_reconstructions(path, self.average, self.data[: self.config.train.sample_num])

    def next_commands(self) -> dict[str, str]:
        return {"scores": f"evaluate {self.run_dir}", "diffusion": f"train --preset latent --first-stage {self.run_dir}"}

    def render(self, run: Run, request: Request, folder: Path) -> list[Path]:
        raise UserError(
            f"{run.name} is an autoencoder: score it with {command('evaluate')}, or train on its latents with "
            f"{command('train')} --preset latent --first-stage {run.name}"
        )

    def samples_to_score(self, run: Run, sampling: Sampling, num: int, reference: Reference) -> Scored:
        originals, labels = choose(*reference.splits["test"], num)
        made = f"reconstructions of test images by {run.name} at step {run.step}"
        return Samples(images.to_uint8(FirstStage(run.net).reconstruct(originals)), labels, made), originals


@dataclass
class Objective:
    """What the kinds of autoencoders do not share in training."""

    latent: Callable
    """latent(x, noise) -> z for the decoder, the penalty of the latents (B,) or (), and a tuple of numbers () to log."""
    nll: Callable
    """nll(error (B,), elements of an image) -> negative log-likelihood (B,), or what stands for it."""
    weight: float
    """Weight of the penalty."""
    logged: tuple[str, ...]
    """Names of what a step logs: the likelihood, the error, the perceptual distance, the penalty, and the other numbers."""
    parameters: list[Parameter] = field(default_factory=list)
    """What is trained beside the network."""


def likelihood_objective(net: AutoencoderKL, train: AutoencoderTrainConfig) -> Objective:
    """The bound of a variational autoencoder (LPIPSWithDiscriminator of the original)."""
    logvar = Parameter(Tensor(np.float32(train.logvar_init)), name="logvar")

    def latent(x, noise):
        moments = net.encode(x)
        return gaussian_sample(moments, noise), gaussian_kl(moments), ()

    def nll(error, size):
        return laplace_nll(error, logvar, size)

    return Objective(latent, nll, train.kl_weight, ("nll_loss", "rec_loss", "p_loss", "kl_loss"), [logvar])


def codebook_objective(net: VQModel, train: AutoencoderTrainConfig) -> Objective:
    """Mean error and the loss of the codebook (VQLPIPSWithDiscriminator of the original)."""

    def latent(x, noise):
        quantized, loss, ids = net.quantize.quantize(net.encode(x))
        return quantized, loss, codebook_use(ids, net.quantize.embedding.weight.shape[0])

    def nll(error, size):
        return error

    logged = ("nll_loss", "rec_loss", "p_loss", "quant_loss", "perplexity", "cluster_usage")
    return Objective(latent, nll, train.codebook_weight, logged)


OBJECTIVES: dict[type, Callable[..., Objective]] = {AutoencoderKL: likelihood_objective, VQModel: codebook_objective}


def autoencoder_losses(
    net: nn.Cell,
    discriminator: nn.Cell | None,
    objective: Objective,
    distance: Callable | None,
    train: AutoencoderTrainConfig,
) -> tuple[Callable, Callable, Callable, Callable, Callable]:
    """The losses of an autoencoder `net` and its discriminator, and the weight between them (losses.py).

    For images x and their reconstructions (B, C, H, W), and noise with the shape of the latents:

        likelihood(x, noise) -> (loss (), (reconstruction, numbers (n,)))
        adversarial(x, noise, weight) -> the same, with disc_factor times weight times the generator's loss
        last_gradients(x, noise) -> the gradients of the likelihood and of the generator's loss by the decoder's last layer
        weigh(*those) -> that weight (), a constant to the loss
        d_loss(x, reconstruction) -> (the discriminator's loss (), mean logits of x and of the reconstruction (2,))

    All but the first and weigh take the condition (B, C', H, W) of a conditional discriminator as last argument.
    `objective.logged` names the numbers; to those of the second, the generator's loss and disc_factor are added.

    Args:
        discriminator: Takes C + C' channels; None if only the likelihood is used.
        distance: distance(x, y) -> (B,), such as `LPIPS`, or None."""
    last_layer = ms.ParameterTuple([net.last_layer])
    latent, nll_of, penalty_weight = objective.latent, objective.nll, objective.weight
    pixel_loss = PIXEL_LOSSES[train.pixel_loss]

    def errors(x, reconstruction):
        """(negative log-likelihood, error, perceptual distance) of each image, (B,)."""
        apart = distance(x, reconstruction) if distance else ops.zeros(x.shape[0], ms.float32)
        perceptual = train.perceptual_weight * apart if distance else 0.0
        error = reconstruction_error(x, reconstruction, perceptual, pixel_loss, train.pixel_weight)
        return nll_of(error, x.size // x.shape[0]), error, apart

    def judge(pictures, cond):
        return discriminator(pictures if cond is None else ops.concat((pictures, cond), 1))

    def evidence(x, noise):
        z, penalty, more = latent(x, noise)
        reconstruction = net.decode_latent(z)
        nll, error, apart = errors(x, reconstruction)
        numbers = (nll.mean(), error.mean(), apart.mean(), penalty.mean(), *more)
        return (nll + penalty_weight * penalty).mean(), reconstruction, numbers

    def likelihood(x, noise=None):
        loss, reconstruction, numbers = evidence(x, noise)
        return loss, (reconstruction, ops.stack(numbers))

    def adversarial(x, noise=None, weight=1.0, cond=None):
        loss, reconstruction, numbers = evidence(x, noise)
        g_loss = generator_loss(judge(reconstruction, cond))
        numbers = (*numbers, g_loss, ops.full_like(g_loss, train.disc_factor))
        return loss + train.disc_factor * weight * g_loss, (reconstruction, ops.stack(numbers))

    def nll_at(h, x):
        return errors(x, net.decoder.last(h))[0].mean()

    def g_loss_at(h, cond):
        return generator_loss(judge(net.decoder.last(h), cond))

    nll_gradient, g_gradient = ms.grad(nll_at, None, last_layer), ms.grad(g_loss_at, None, last_layer)
    of_all_ranks = RankMean()

    def last_gradients(x, noise=None, cond=None):
        h = net.decoder.features(net.post_quant_conv(latent(x, noise)[0]))
        return nll_gradient(h, x)[0], g_gradient(h, cond)[0]

    def weigh(of_nll, of_g_loss):
        return adaptive_weight(of_all_ranks(of_nll), of_all_ranks(of_g_loss), train.disc_weight)

    def d_loss(x, reconstruction, cond=None):
        real, fake = judge(x, cond), judge(reconstruction, cond)
        loss = discriminator_loss(real, fake, train.disc_factor, D_LOSSES[train.disc_loss])
        return loss, ops.stack((real.mean(), fake.mean()))

    return likelihood, adversarial, last_gradients, weigh, d_loss


def by_parts(gradients: Callable, weigh: Callable, parts: int, before_part: Callable[[int], Any]) -> Callable:
    """A function of a batch's fields: `weigh` of the mean gradients over `parts` equal parts of the batch."""

    def whole(*batch):
        return weigh(*gradients(*batch))

    if parts == 1:
        return compiled(whole)
    of_part, finish = compiled(gradients), compiled(weigh)

    def mean_and_weigh(*batch):
        found = []
        for k in range(parts):
            before_part(k)
            found.append(of_part(*(rows_of(value, k, parts) for value in batch)))
        return finish(*(each.mean(0) for each in stack_parts(*found)))

    return mean_and_weigh


def perceptual_distance(config: AutoencoderRunConfig) -> Callable | None:
    """LPIPS where its weights are given, or the same distance through the bundled classifier."""
    train = config.train
    if not train.perceptual_weight:
        return None
    if train.vgg and train.lpips:
        return load_lpips(train.vgg, train.lpips)
    if (config.model.channels, config.data.size) in ((1, 28), (1, 32)):
        return classifier_distance(load_classifier())
    what = "--train.perceptual-weight needs the weights of LPIPS for such images"
    raise UserError(f"{what}: give --train.vgg and --train.lpips, or set it to 0")


def save_reconstructions(path: Path, first_stage: FirstStage, pictures: np.ndarray) -> Path:
    """Write a grid of images (N, H, W, C) uint8, each beside its reconstruction. All ranks call this, and rank 0 writes."""
    pairs = np.stack([pictures, images.to_uint8(first_stage.reconstruct(pictures))], 1)
    if ranks()[0] == 0:
        images.save_grid(path, pairs.reshape(-1, *pictures.shape[1:]), columns=min(16, 2 * len(pictures)))
    return path


def load_first_stage(run: Path, patch: int | None = None) -> FirstStage:
    """The autoencoder of a run, for whole images or for patches of this side in pixels. Raises UserError if there is no such
    run, or it is not an autoencoder's, or the patches do not fit it."""
    loaded = Run(run)
    if not isinstance(loaded.config, AutoencoderRunConfig):
        raise UserError(f"{run} is not the run of an autoencoder: train one with {command('train')} --preset autoencoder")
    f = loaded.config.model.size_multiple
    if patch is not None and patch % f:
        raise UserError(f"--first-stage-patch is {patch}: it must be divisible by {f} for the first stage {run}")
    return FirstStage(loaded.net, 1.0, f, patch)
