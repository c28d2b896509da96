"""What runs of pixels, points and latents share: noise, loss, the compiled step, samples of the average."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mindspore import Parameter, Tensor, nn, ops

from ...convert import listed
from ...images import to_float
from ...models.layers import Masks
from ...process import Process, at, predict
from ...randomness import (
    ImportanceTimesteps,
    Random,
    Stream,
    antithetic_timesteps,
    log_normal_timesteps,
    nearer_timesteps,
    offset_noise,
    uniform_timesteps,
)
from ...runtime import UserError, check_interrupted, gather
from ...sampling import Generator, Sampling
from ..checkpoint import Checkpoint, readable
from ..lora import LowRank
from ..pack import make_pack
from ..step import EMA, copy_network, make_optimizer, make_train_step
from ..validation import Validation, even_timesteps, in_batches_of
from .base import Arrays, Logged, Task, load_initial_weights, set_precision


class DiffusionTask(Task):
    """A denoiser and its process. A kind adds data, `shape`, conditions and pictures."""

    config: Any
    net: nn.Cell
    diffusion: Process
    shape: tuple[int, ...]  # of one x that is diffused
    clip_denoised = True  # whether the data are known to lie in [-1, 1]
    null_label: Any = None  # the label or token for "no condition"; None where the network has no such condition
    self_condition = False
    has_codebook = False
    teacher: nn.Cell | None = None  # that consistency tuning learns from
    quantize: Callable | None = None  # x_0 -> the nearest vectors of the codebook
    cond_fields: tuple[str, ...] = ()  # names of the network's conditions, in its order

    def build_parts(self) -> tuple[nn.Cell, Process]:
        config = self.config
        return config.model.build(config.train.seed), config.diffusion.build(self.clip_denoised)

    def generator(self, net: nn.Cell, diffusion: Process) -> Generator:
        generator = Generator(net, diffusion, self.shape, self.null_label, self.self_condition)
        generator.quantize = self.quantize
        return generator

    # Training

    def make_networks(self, device: str) -> None:
        config, train = self.config, self.config.train
        if train.teacher_guidance != 1 and self.null_label is None:
            raise UserError("--train.teacher-guidance needs classes or captions, which this run has not: leave it out")
        self.net, self.diffusion = self.build()
        T = self.diffusion.num_timesteps
        self.loaded = load_initial_weights(config, self.run_dir, self.net)
        self.preview_sampling = Sampling().resolve(self, "ddpm", train.sample_steps)

        loss_scaler = set_precision(config.precision, self.net)
        self.teacher = copy_network(self.net, "teacher").set_train(False) if train.consistency else None
        self.ema, extra_emas = EMA(self.net, train.ema_decay), [EMA(self.net, length=each) for each in train.ema_lengths]
        self.average = self.generator(self.ema.net, self.diffusion)
        self.net.set_train()  # after the averages are copied, which stay in evaluation mode
        self.low_rank = self.make_low_rank() if train.lora_rank else None
        self.logvar = Parameter(Tensor(np.zeros(T, np.float32)), name="logvar") if train.learn_logvar else None
        extra = [*(self.low_rank.adapters if self.low_rank else []), *([self.logvar] if train.learn_logvar else [])]
        options = {"extra_parameters": extra, "decay": train.lr_decay, "name": train.optimizer}
        self.optimizer = make_optimizer(self.net, train.lr, train.warmup_steps, train.total_steps, **options)
        self.importance = ImportanceTimesteps(T) if train.timestep_sampling == "importance" else None
        self.step_options = {"extra_emas": extra_emas, "loss_scaler": loss_scaler}
        kept = {"extra_parameters": self.importance.parameters if self.importance else [], **self.step_options}
        if self.teacher is not None:
            kept["extra_parameters"] = [*kept["extra_parameters"], *self.teacher.get_parameters()]
        if self.low_rank:
            kept["extra_parameters"] = [*kept["extra_parameters"], *self.low_rank.bases]
            kept["extra_files"] = {"lora": self.low_rank.adapters}
        self.checkpoint = Checkpoint(self.run_dir, self.net, self.optimizer, self.ema, keep=train.keep_checkpoints, **kept)
        self.step_options |= {"clip_norm": train.clip_norm, "world_size": self.world_size, "has_aux": bool(self.importance)}

    def make_low_rank(self) -> LowRank:
        """The updates that are trained in place of the network's weights. What --init-from lacks, such as the embeddings of
        other classes, is trained whole."""
        train, latest = self.config.train, next(reversed(readable(self.run_dir).values()), {})
        new = [p.name for p in self.net.get_parameters() if self.loaded and p.name not in self.loaded.loaded]
        self.trained_whole = latest.get("trained_whole", " ".join(new))
        whole = self.trained_whole.split()
        low_rank = LowRank(self.net, train.lora_rank, train.lora_targets, train.seed, whole)
        if self.rank == 0:
            numbers, others = sum(p.size for p in low_rank.adapters), {"trained whole": whole} if whole else {}
            print(f"low-rank updates of {len(low_rank.weights)} weights, {numbers:,} numbers; {listed(others)}".strip("; "))
        return low_rank

    def checkpoint_record(self) -> dict[str, Any]:
        return super().checkpoint_record() | ({"trained_whole": self.trained_whole} if self.low_rank else {})

    def prepare(self) -> None:
        train, options, low_rank = self.config.train, self.step_options, self.low_rank
        pack = make_pack(low_rank.updates if low_rank else self.net, self.optimizer)
        self.packs = [] if pack is None else [pack]
        self.masks = Masks(self.net, train.batch_size, self.shape[1:], train.accumulate)
        need_host = low_rank or options["has_aux"] or options["extra_emas"] or options["loss_scaler"] or self.masks.layers
        need_host = need_host or train.accumulate > 1
        if pack is None and not need_host:  # a loop in the graph keeps its state on the CPU; a card would copy it each time
            counts = [getattr(train, f"{name}_every", 0) for name in ("log", "sample", "save", "score", "validate")]
            self.steps_per_call = math.gcd(train.steps_per_call, self.start_step, train.total_steps, *counts)
        options |= {"steps_per_call": self.steps_per_call, "pack": pack, "low_rank": low_rank}
        options |= {"weight_decay": train.weight_decay, "accumulate": train.accumulate, "before_part": self.masks.use}
        self.train_step = make_train_step(self.make_loss(), self.optimizer, self.ema, **options)

    def make_x_start(self) -> Callable:
        """A function for the graph, from a batch's x_start and latent_noise to the x_0 that is diffused."""
        return lambda x_start, latent_noise: x_start

    def make_loss(self, net: nn.Cell | None = None) -> Callable:
        """The loss of a batch, whose fields are the function's parameters; by default of the network that is trained."""
        predictor: nn.Cell = self.net if net is None else net
        diffusion, logvar, to_x_start = self.diffusion, self.logvar, self.make_x_start()
        guided = None if self.teacher is None else self.make_guided()

        def loss_fn(x_start, t, noise, weights=None, latent_noise=None, self_cond_mask=None, r=None,
                labels=None, tokens=None, context=None, cond_image=None):  # fmt: skip
            cond = () if labels is None else (labels,)
            cond = cond if tokens is None else cond + (tokens,)
            cond = cond if context is None else cond + (context,)
            cond = cond if cond_image is None else cond + (cond_image,)
            x_start = to_x_start(x_start, latent_noise)
            if guided is None:
                losses = diffusion.losses(predictor, x_start, t, noise, cond, logvar, self_cond_mask)
            else:
                losses = diffusion.consistency_losses(predictor, x_start, t, r, noise, cond, guided)
            return ops.mean(losses) if weights is None else (ops.mean(weights * losses), losses)

        return loss_fn

    def make_guided(self) -> Callable:
        """A function for the graph, (x_t, t, cond) -> the teacher's x_0 with its guidance."""
        diffusion, teacher, train = self.diffusion, self.teacher, self.config.train
        assert teacher is not None
        scale, (first, last) = train.teacher_guidance, train.teacher_guidance_interval or (0, diffusion.num_timesteps - 1)
        t, null = np.arange(diffusion.num_timesteps), np.asarray(0 if self.null_label is None else self.null_label)
        scales = Tensor(np.where((first <= t) & (t <= last), scale, 1).astype(np.float32))
        null = Tensor(null.astype(np.float32 if null.dtype.kind == "f" else np.int32))

        def plain(x_t, t, cond):
            return diffusion.predict_start(predict(teacher, x_t, t, cond), x_t, t)

        def guided(x_t, t, cond):
            x_start = plain(x_t, t, cond)
            if scale != 1:
                uncond = plain(x_t, t, (ops.zeros_like(cond[0]) + null,) + cond[1:])
                x_start = uncond + at(scales, t, x_t) * (x_start - uncond)
            return ops.clamp(x_start, -1.0, 1.0) if diffusion.clip_denoised else x_start

        return guided

    def draw_batch(self, x: np.ndarray, labels: np.ndarray, step: int) -> Arrays:
        train = self.config.train
        rng, batch = self.random(step), {"x_start": x}
        if self.importance:
            batch["t"], batch["weights"] = self.importance.draw(rng, len(x))
        else:
            batch["t"] = self.draw_timesteps(rng, len(x))
        if stages := train.consistency:
            batch["r"] = nearer_timesteps(batch["t"], stages[min(step * len(stages) // train.total_steps, len(stages) - 1)])
        batch["noise"] = offset_noise(rng, (len(x), *self.shape), train.offset_noise)
        return batch | self.draw_conditions(rng, batch, labels)

    def held_out(self) -> "DiffusionTask":
        """This task with held-out `data` and `labels`, those of `choose_held`."""
        raise NotImplementedError

    def make_validation(self) -> Validation:
        """The loss that is trained, at evenly spaced timesteps."""
        train, held = self.config.train, self.held_out()
        x = to_float(held.data) if held.data.dtype == np.uint8 else held.data
        rng = np.random.default_rng((train.seed, Stream.VALIDATION))
        batch = {"x_start": x, "t": even_timesteps(rng, self.diffusion.num_timesteps, len(x))}
        if train.consistency:
            batch["r"] = nearer_timesteps(batch["t"], train.consistency[-1])
        batch["noise"] = offset_noise(rng, (len(x), *self.shape), train.offset_noise)
        batch |= held.draw_conditions(rng, batch, held.labels)
        return Validation(self.ema.net, self.make_loss, in_batches_of(train.batch_size, batch))

    def draw_timesteps(self, rng: Random, n: int) -> np.ndarray:
        train, T = self.config.train, self.diffusion.num_timesteps
        if train.timestep_sampling == "log-normal":
            return log_normal_timesteps(rng, self.ratios, n, train.timestep_mean, train.timestep_std)
        return (antithetic_timesteps if train.timestep_sampling == "antithetic" else uniform_timesteps)(rng, T, n)

    @cached_property
    def ratios(self) -> np.ndarray:
        """sigma / alpha of each timestep (T,)."""
        with np.errstate(divide="ignore"):
            return self.diffusion.sigmas / self.diffusion.alphas

    def draw_conditions(self, rng: Random, batch: Arrays, labels: np.ndarray) -> Arrays:
        """The other fields of a batch, drawn from `rng`."""
        return {"self_cond_mask": rng.integers(0, 2, len(labels)).astype(np.float32)} if self.self_condition else {}

    def advance(self, batch: Arrays, step: int) -> tuple[Tensor, Tensor, Logged]:
        self.masks.draw(self.config.train.seed, step, self.rank)
        loss, norm, *aux = self.train_step(**batch)
        if self.importance:
            losses = aux[0].asnumpy().reshape(-1)
            t, losses = gather(np.stack([np.float32(batch["t"]), losses])).swapaxes(0, 1)  # of all ranks
            self.importance.update(t.astype(np.int32).ravel(), losses.ravel())
        return loss, norm, {}

    # Samples of the average

    def preview_conditions(self, num: int) -> Arrays:
        return self.conditions(num)

    def draw(
        self, num: int, sampling: Sampling | None = None, batch_size: int = 64, watch: Callable | None = None
    ) -> np.ndarray:
        """`num` samples (num, ...) of the averaged network, as floats; watch(i, x, x_start) is called after each step."""
        self.write_back()
        sampling = replace(sampling or self.preview_sampling, seed=self.config.train.seed, batch_size=batch_size)

        def after_step(*step: Any) -> None:
            check_interrupted()
            if watch:
                watch(*step)

        return self.decode(self.average.draw(sampling, num, self.in_order(self.preview_conditions(num)), after_step))

    def in_order(self, conditions: Arrays) -> list[np.ndarray]:
        """Conditions by name -> in the network's order."""
        return [conditions[name] for name in self.cond_fields]
