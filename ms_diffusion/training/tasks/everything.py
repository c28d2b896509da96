"""What there is to train: a diffusion model, of images, points or latents, or the autoencoder that makes these.

`train.py` has the loop, which is the same for all; a task has data, networks, the compiled step and pictures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ... import images
from ...convert import LoadReport, load_pretrained
from ...data.batches import check_enough, load_images
from ...data.captions import draw_captions
from ...data.conditions import condition_image
from ...data.fashion_mnist import center_crop
from ...data.points import Normalizer, load_points, read_saved_points
from ...latent import FirstStage
from ...losses import D_LOSSES, adaptive_weight, autoencoder_loss, discriminator_loss, generator_loss
from ...metrics.distances import frechet_distance, mean_and_covariance
from ...metrics.features import Features
from ...models.autoencoder import gaussian_kl, gaussian_sample
from ...models.classifier import Classifier, load_classifier
from ...models.discriminator import NLayerDiscriminator
from ...models.layers import set_compute_type
from ...models.lpips import classifier_distance, load_lpips
from ...runtime import UserError, compiled
from ...samplers import generate
from ...sampling import Sampling, in_turn
from ..checkpoint import Checkpoint, checkpoints
from ..presets import Config, resolve_first_stage
from ..step import EMA, make_optimizer, make_train_step

STREAM_NOISE = 2  # of np.random.default_rng((seed, stream, rank, step)); the data pipeline has its own


@dataclass
class Task:
    """What the loop of `train.py` needs to know."""

    checkpoint: Checkpoint
    state: dict | None
    """That of the checkpoint that was restored."""
    data: np.ndarray
    labels: np.ndarray
    per_call: int
    """Steps that one call of `advance` makes."""
    optimizer: nn.Optimizer
    advance: Callable
    """advance(x, labels, step) -> (loss (), gradient norm (), more of the last step to log, by name), Tensors: train on
    this batch, or on `per_call` of them."""
    draw_samples: Callable
    """draw_samples(step) -> the picture's path."""
    score: Callable | None = None
    """score(step) -> FID of a few images."""
    record: dict = field(default_factory=dict)
    """What goes into a checkpoint's state.json besides."""


def diffusion_task(config: Config, run_dir: Path, device: str, rank: int, world_size: int) -> Task:
    """Of images, points, or latents of a first stage."""
    train, classes, null = config.train, config.model.num_classes, config.model.null_label

    # Network, optimizer, and what a checkpoint restores
    net, diffusion = config.build()
    loaded = load_initial_weights(config, run_dir, net)
    sampling = Sampling(sampler="ddpm", steps=train.sample_steps)
    sampling.settle(config, diffusion.num_timesteps)
    loss_scaler = None
    if config.precision != "fp32":
        if config.precision == "bf16" and device == "CPU":
            raise UserError("MindSpore has no bf16 on the CPU: use --precision fp16 or fp32")
        set_compute_type(net, {"fp16": ms.float16, "bf16": ms.bfloat16}[config.precision])
        if config.precision == "fp16":
            loss_scaler = ms.amp.DynamicLossScaler(scale_value=2.0**16, scale_factor=2, scale_window=2000)
    ema, extra_emas = EMA(net, train.ema_decay), [EMA(net, length=length) for length in train.ema_lengths]
    net.set_train()  # after the averages are made, which know no dropout
    logvar = Parameter(Tensor(np.zeros(diffusion.num_timesteps, np.float32)), name="logvar") if train.learn_logvar else None
    more = [logvar] if train.learn_logvar else []
    optimizer = make_optimizer(net, train.lr, train.warmup_steps, train.total_steps, more, train.lr_decay)
    importance = randomness.ImportanceTimesteps(diffusion.num_timesteps) if train.timestep_sampling == "importance" else None
    others = importance.parameters if importance else []
    checkpoint = Checkpoint(run_dir, net, optimizer, ema, loss_scaler, train.keep_checkpoints, others, extra_emas)

    # Data, and the step to go on from
    if config.is_points:
        points, test_points = load_points(config.data.name, config.data.dir, config.data.num, train.seed)
        frame = Normalizer.of(points)
        data, labels = frame.to_unit(points), np.zeros(len(points), np.int32)
    else:
        data, labels = load_training_images(config)
    # As make_dataset will, but before anything is encoded or kept
    check_enough(data, train.batch_size if train.total_steps else 1, world_size)
    if classes is not None and labels.max() >= classes:
        raise UserError(f"the data has labels up to {labels.max()}: set --model.num-classes {labels.max() + 1}")
    state = checkpoint.load_latest()
    start = state["step"] if state else 0
    if config.is_points:
        save_points(run_dir / "points.npz", points, test_points)
    per_call = 1
    if not (importance or extra_emas or loss_scaler):  # these need the host, or a graph of their own, after each step
        every = (train.total_steps, train.log_every, train.sample_every, train.save_every, train.score_every)
        per_call = math.gcd(train.steps_per_call, *every, start)
    record, originals, first_stage = {}, data, None
    if config.is_latent:
        first_stage = resolve_first_stage(config, run_dir, rank)
        data = first_stage.cached_moments(originals, config.data.dir)
        if state and "latent_scale" not in state:
            raise UserError(
                f"the checkpoint of step {start} in {run_dir} has no latent_scale: remove it, or use another --run-dir"
            )
        known = state["latent_scale"] if state else config.latent_scale or (loaded and loaded.scale_factor)
        first_stage.scale = known or scale_of(data, train)
        record = {"latent_scale": first_stage.scale}
        if rank == 0 and not state:
            save_reconstructions(run_dir / "samples" / "first-stage.png", first_stage, originals[: train.sample_num])
    scored = train.score_every and rank == 0 and start < train.total_steps
    if scored:
        features, reference = scoring(train, originals)

    # What a step draws, all of it from (seed, rank, step); nothing that it does not need, for each input costs time
    def draw_batch(x_start, labels, step: int):
        rng = np.random.default_rng((train.seed, STREAM_NOISE, rank, step))
        n, more = train.batch_size, []
        if importance:
            t, weights = importance.draw(rng, n)
            more.append(weights)
        elif train.timestep_sampling == "antithetic":
            t = randomness.antithetic_timesteps(rng, diffusion.num_timesteps, n)
        else:
            t = randomness.uniform_timesteps(rng, diffusion.num_timesteps, n)
        noise = randomness.offset_noise(rng, (n, *config.shape), train.offset_noise)
        if config.is_latent:
            more.append(rng.standard_normal(noise.shape, np.float32))
        if config.model.self_condition:
            more.append(rng.integers(0, 2, n).astype(np.float32))
        if null is not None:
            told = draw_captions(rng, labels) if config.is_text else labels
            more.append(randomness.drop_labels(rng, told, train.label_dropout, null))
        if config.data.condition != "none":
            more.append(condition_image(config.data.condition, x_start, config.data.lowres_size, rng))
        return [x_start, t, noise, *more]

    # The compiled step
    def loss_fn(x_start, t, noise, *more):
        weights, more = (more[0], more[1:]) if importance else (None, more)
        if config.is_latent:
            x_start, more = first_stage.scale * gaussian_sample(x_start, more[0]), more[1:]
        self_cond_mask, cond = (more[0], more[1:]) if config.model.self_condition else (None, more)
        losses = diffusion.losses(net, x_start, t, noise, cond, logvar, self_cond_mask)
        return (ops.mean(weights * losses), losses) if importance else ops.mean(losses)

    train_step = make_train_step(
        loss_fn, optimizer, ema, train.clip_norm, loss_scaler, world_size, importance is not None, extra_emas, per_call
    )

    def advance(x_start, labels, step: int):
        if per_call == 1:
            batch = draw_batch(x_start, labels, step)
        else:
            drawn = [draw_batch(x_start[k], labels[k], step + k) for k in range(per_call)]
            batch = [np.stack(values) for values in zip(*drawn, strict=True)]
        loss, norm, *aux = train_step(*map(Tensor, batch))
        if importance:
            importance.update(batch[1], aux[0].asnumpy())
        return loss, norm, {}

    # Pictures and scores of the average
    denoise = sampling.make_denoiser(ema.net, diffusion, null, clip=not config.is_latent)

    def conditions(num: int) -> list[np.ndarray]:
        """Each class in turn, and the first images' conditions."""
        cond = [*in_turn(config, num)[1]]
        if config.data.condition != "none":
            shown = images.to_float(originals[np.arange(num) % len(originals)])
            rng = np.random.default_rng((train.seed, STREAM_NOISE))
            cond.append(condition_image(config.data.condition, shown, config.data.lowres_size, rng))
        return cond

    def draw(sampling: Sampling, num: int, batch_size: int = 64) -> np.ndarray:
        """`num` samples (num, ...)."""
        sampler, timesteps = sampling.make_sampler(config.model.self_condition), sampling.timesteps(diffusion)
        cond = conditions(num)
        x = generate(sampler, denoise, diffusion, timesteps, config.shape, num, train.seed, batch_size, cond=cond)
        return first_stage.decode(x) if config.is_latent else x

    def draw_samples(step: int) -> Path:
        """A grid of samples. Points beside the data."""
        path, num = run_dir / "samples" / f"step-{step:07d}.png", train.sample_num
        x = draw(sampling, num, num if config.is_points else 64)
        if config.is_points:
            plots2d.save_samples(path, frame.to_points(x), test_points[:num], f"step {step}")
        else:
            images.save_grid(path, images.to_uint8(x), columns=config.classes)
        return path

    def score(step: int) -> float:
        """The FID of a few images."""
        x = draw(replace(sampling, sampler="dpmpp_2m", steps=min(15, diffusion.num_timesteps)), train.score_num)
        if not np.isfinite(x).all():
            raise UserError(
                f"samples are not finite at step {step}: resume with a lower --train.lr from the last checkpoint"
            )
        return frechet_distance(*mean_and_covariance(features(center_crop(images.to_uint8(x)))["features"]), *reference)

    return Task(
        checkpoint, state, data, labels, per_call, optimizer, advance, draw_samples, score if scored else None, record
    )


def autoencoder_task(config: Config, run_dir: Path, device: str, rank: int, world_size: int) -> Task:
    """The first stage of latent diffusion: an autoencoder and its discriminator, which take turns (losses.py)."""
    train = config.train
    if config.precision != "fp32":
        raise UserError("an autoencoder is trained in float32: leave out --precision")

    # Networks, optimizers, and what a checkpoint restores
    (net, _), discriminator = config.build(), None
    load_initial_weights(config, run_dir, net)
    logvar = Parameter(Tensor(np.float32(0)), name="logvar")
    optimizer = make_optimizer(
        net, train.lr, train.warmup_steps, train.total_steps, [logvar], train.lr_decay, train.adam_betas
    )
    ema, others = EMA(net, train.ema_decay), []
    net.set_train()
    if train.disc_weight:
        if train.disc_norm == "act" and world_size > 1:
            raise UserError("--train.disc-norm act begins with one device's images: take batch on several devices")
        channels = config.model.channels
        discriminator = NLayerDiscriminator(channels, train.disc_channels, train.disc_layers, train.disc_norm, train.seed)
        d_steps = max(train.total_steps - train.disc_start, 1)
        d_optimizer = make_optimizer(discriminator, train.disc_lr, 0, d_steps, (), train.lr_decay, train.adam_betas)
        both = (*discriminator.get_parameters(), *d_optimizer.get_parameters())
        others = {id(p): p for p in both}.values()
        for p in others:  # no two of a checkpoint may have one name
            p.name = f"discriminator.{p.name}"
    checkpoint = Checkpoint(run_dir, net, optimizer, ema, None, train.keep_checkpoints, others)
    data, labels = load_training_images(config)
    state = checkpoint.load_latest()
    h = config.data.size // config.model.size_multiple
    latent_shape = (config.model.embed_dim, h, h)
    distance = perceptual_distance(config)

    # The steps, compiled when first called: until disc_start without the discriminator
    likelihood, adversarial, weigh, d_loss = autoencoder_losses(net, discriminator, logvar, distance, train)
    ae_step = make_train_step(likelihood, optimizer, ema, train.clip_norm, None, world_size, True)
    if discriminator:
        weigh = compiled(weigh)
        adversarial_step = make_train_step(adversarial, optimizer, ema, train.clip_norm, None, world_size, True)
        d_step = make_train_step(d_loss, d_optimizer, None, train.clip_norm, None, world_size)

    def advance(x, labels, step: int):
        rng = np.random.default_rng((train.seed, STREAM_NOISE, rank, step))
        x, noise = Tensor(x), Tensor(rng.standard_normal((len(x), *latent_shape), np.float32))
        if not discriminator or step < train.disc_start:
            return *ae_step(x, noise)[:2], {"logvar": logvar}
        if train.disc_norm == "act":
            discriminator.initialise(x)
        weight = weigh(x, noise)
        loss, norm, reconstruction = adversarial_step(x, noise, weight)
        return loss, norm, {"logvar": logvar, "disc_weight": weight, "disc_loss": d_step(x, reconstruction)[0]}

    # Pictures of the average
    first_stage = FirstStage(ema.net)
    shown = data[: train.sample_num]

    def draw_samples(step: int) -> Path:
        return save_reconstructions(run_dir / "samples" / f"step-{step:07d}.png", first_stage, shown)

    return Task(checkpoint, state, data, labels, 1, optimizer, advance, draw_samples)


def autoencoder_losses(net, discriminator, logvar, distance, train):
    """What the steps of an autoencoder `net` and its discriminator minimise, and the weight between (losses.py).

    Of images x and their reconstructions (B, C, H, W), and noise like the latents:

        likelihood(x, noise) -> (loss (), reconstruction)
        adversarial(x, noise, weight) -> the same, with the discriminator to deceive
        weigh(x, noise) -> that weight (), which is a constant to the loss
        d_loss(x, reconstruction) -> the discriminator's loss ()

    All but the first take a conditional discriminator's condition (B, C', H, W) last.

    Args:
        discriminator: of C + C' channels; None where only the likelihood is used.
        logvar: parameter ().
        distance: distance(x, y) -> (B,), such as `LPIPS`, or None.
        train: `presets.AutoencoderTrainConfig`.
    """
    last_layer = ms.ParameterTuple([net.last_layer])

    def nll(x, reconstruction, kl=0.0):
        perceptual = train.perceptual_weight * distance(x, reconstruction) if distance else 0.0
        return autoencoder_loss(x, reconstruction, kl, logvar, train.kl_weight, perceptual)

    def judge(images, cond):
        return discriminator(images if cond is None else ops.concat((images, cond), 1))

    def likelihood(x, noise):
        reconstruction, moments = net(x, noise)
        return nll(x, reconstruction, gaussian_kl(moments)), reconstruction

    def adversarial(x, noise, weight, cond=None):
        loss, reconstruction = likelihood(x, noise)
        return loss + weight * generator_loss(judge(reconstruction, cond)), reconstruction

    def nll_at(h, x):
        return nll(x, net.decoder.last(h))

    def g_loss_at(h, cond):
        return generator_loss(judge(net.decoder.last(h), cond))

    nll_gradient, g_gradient = ms.grad(nll_at, None, last_layer), ms.grad(g_loss_at, None, last_layer)

    def weigh(x, noise, cond=None):  # by the gradients at the decoder's last layer alone
        h = net.decoder.features(net.post_quant_conv(gaussian_sample(net.encode(x), noise)))
        return train.disc_factor * adaptive_weight(nll_gradient(h, x)[0], g_gradient(h, cond)[0], train.disc_weight)

    def d_loss(x, reconstruction, cond=None):
        real, fake = judge(x, cond), judge(reconstruction, cond)
        return discriminator_loss(real, fake, train.disc_factor, D_LOSSES[train.disc_loss])

    return likelihood, adversarial, weigh, d_loss


def load_initial_weights(config: Config, run_dir: Path, net: nn.Cell) -> LoadReport | None:
    """Give the network of a new run the weights that it is to begin with, and say what became of them."""
    if not config.init_from or checkpoints(run_dir):
        return None
    report = load_pretrained(net, config.init_from, None, config.init_ignore, config.init_partial, config.init_ema)
    print(f"{config.init_from}: {report}")
    return report


def load_training_images(config: Config) -> tuple[np.ndarray, np.ndarray]:
    data = config.data
    return load_images(data.name, data.dir, "train", data.size, config.model.channels)


def scoring(train, data: np.ndarray):
    """(features, mean and covariance of those of as many training images as are scored)."""
    if len(data) <= Classifier.num_features:
        raise UserError(f"{len(data)} images are too few for --train.score-every: leave it out")
    features, chosen = Features(), np.random.default_rng(train.seed).permutation(len(data))[: train.score_num]
    return features, mean_and_covariance(features(center_crop(data[chosen]))["features"])


def save_reconstructions(path: Path, first_stage: FirstStage, shown: np.ndarray) -> Path:
    """A grid of images (N, H, W, C) uint8, each beside what comes back of it."""
    pairs = np.stack([shown, images.to_uint8(first_stage.reconstruct(shown))], 1)
    images.save_grid(path, pairs.reshape(-1, *shown.shape[1:]), columns=min(16, 2 * len(shown)))
    return path


def perceptual_distance(config: Config):
    """How unlike two images look: LPIPS where its weights are given, or the same by the classifier in the package."""
    train = config.train
    if not train.perceptual_weight:
        return None
    if train.vgg:
        return load_lpips(train.vgg, train.lpips)
    if (config.model.channels, config.data.size) in ((1, 28), (1, 32)):
        return classifier_distance(load_classifier())
    raise UserError(
        "--train.perceptual-weight needs weights for such images: give --train.vgg and --train.lpips, or set it to 0"
    )


def save_points(path: Path, train: np.ndarray, test: np.ndarray) -> None:
    """Keep a run's points with it, for `sample.py`; refuse other points than those that it has."""
    if path.exists() and not all(map(np.array_equal, read_saved_points(path), (train, test))):
        raise UserError(f"the points are not those of the run in {path.parent}: use another --run-dir for them")
    write(path, lambda f: np.savez(f, train=train, test=test))


def scale_of(moments: np.ndarray, train) -> float:
    """1 / the standard deviation of a first batch's latents (Rombach et al. 2022, appendix G)."""
    rng = np.random.default_rng((train.seed, STREAM_NOISE))
    batch = moments[rng.permutation(len(moments))[: train.batch_size]]
    noise = rng.standard_normal((len(batch), batch.shape[1] // 2, *batch.shape[2:]), np.float32)
    return float(1 / gaussian_sample(Tensor(batch), Tensor(noise)).asnumpy().std())
