"""All random numbers are drawn on the host, so that runs can be repeated and resumed exactly.

A run uses `np.random.default_rng((seed, stream, ...))` with the streams below, sample i `default_rng((seed, i))`.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from mindspore import Parameter, Tensor


class Stream(IntEnum):
    """The streams of random numbers of one seed."""

    ORDER = 1  # (seed, ORDER, epoch): the order of the training data
    NOISE = 2  # (seed, NOISE, block, step): timesteps, noise, dropped labels; (seed, NOISE): the batch for the latent scale
    FLIP = 3  # (seed, FLIP, block, step): which images are mirrored
    DROPOUT = 4  # (seed, DROPOUT, row, step): which values of a row of the batch of all ranks are dropped
    # Larger than any sample's index:
    POINTS_TRAIN = 2**31  # (seed, POINTS_TRAIN): training points of a known distribution
    POINTS_TEST = 2**31 + 1  # its test points
    POINTS_SPLIT = 2**31 + 2  # the split of a file's points into training and test points
    LORA = 2**31 + 3  # (seed, LORA): the first factors of low-rank updates
    VALIDATION = 2**31 + 4  # (seed, VALIDATION): held-out data, and what is drawn for them; (..., 0): which of the data


BLOCK = 256  # rows of a batch that share a generator


class RowsRandom:
    """Random numbers for some rows of a batch, the same whoever draws the other rows: each block of rows is drawn whole, and
    those that are not wanted are left out. The methods are those of a NumPy Generator; the first axis of a size is replaced.

    Args:
        blocks: (generator, number of rows, the wanted ones of them), a slice or an array of indices."""

    def __init__(self, blocks: Sequence[tuple[np.random.Generator, int, Any]]):
        self.blocks = blocks

    def rows(self, draw: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
        """The wanted rows of what draw(generator, n) returns for the n rows of each block, (n, ...)."""
        return np.concatenate([draw(rng, n)[wanted] for rng, n, wanted in self.blocks])

    def random(self, size: Any) -> np.ndarray:
        return self.rows(lambda rng, n: rng.random(of_rows(size, n)))

    def integers(self, low: int, high: int, size: Any) -> np.ndarray:
        return self.rows(lambda rng, n: rng.integers(low, high, of_rows(size, n)))

    def choice(self, a: Any, size: Any, p: Any = None) -> np.ndarray:
        return self.rows(lambda rng, n: rng.choice(a, of_rows(size, n), p=p))

    def standard_normal(self, size: Any, dtype: Any = np.float64) -> np.ndarray:
        return self.rows(lambda rng, n: rng.standard_normal(of_rows(size, n), dtype))


def of_rows(size: Any, n: int) -> tuple[int, ...]:
    """A size, an int or a shape, with n rows."""
    return (n, *size[1:]) if isinstance(size, Sequence) else (n,)


def of_step(seed: int, stream: Stream, step: int, rows: int, rank: int = 0, world_size: int = 1) -> RowsRandom:
    """The random numbers of a rank in a training step. They do not depend on the number of ranks: the batch of all ranks is
    divided into blocks of `BLOCK` rows, and block k has the generator (seed, stream, k, step). `rows` is the batch of one
    rank; rank r has the rows r * rows to (r + 1) * rows - 1."""
    first, last, total = rank * rows, (rank + 1) * rows, world_size * rows
    blocks = []
    for k in range(first // BLOCK, -(-last // BLOCK)):
        start, stop = k * BLOCK, min((k + 1) * BLOCK, total)
        wanted = slice(max(first - start, 0), min(last, stop) - start)
        blocks.append((np.random.default_rng((seed, stream, k, step)), stop - start, wanted))
    return RowsRandom(blocks)


Random = np.random.Generator | RowsRandom


def draw_rows(rng: Random, n: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> np.ndarray:
    """draw(rng, n), rows (n, ...) that depend on one another, such as pairs; those that are wanted of a `RowsRandom`."""
    return rng.rows(draw) if isinstance(rng, RowsRandom) else draw(rng, n)


TIMESTEP_SAMPLING = ("uniform", "antithetic", "importance", "log-normal")


def uniform_timesteps(rng: Random, T: int, n: int) -> np.ndarray:
    """(n,) int32 in [0, T)."""
    return rng.integers(0, T, n).astype(np.int32)


def antithetic_timesteps(rng: Random, T: int, n: int) -> np.ndarray:
    """Pairs t, T - 1 - t: (n,) int32, each uniform in [0, T); they reduce the variance of a batch's mean loss."""

    def pairs(rng: np.random.Generator, n: int) -> np.ndarray:
        t = rng.integers(0, T, (n + 1) // 2)
        return np.concatenate([t, T - 1 - t])[:n].astype(np.int32)

    return draw_rows(rng, n, pairs)


def log_normal_timesteps(rng: Random, ratios: np.ndarray, n: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """(n,) int32 in [0, T), at which log(sigma / alpha) is nearly N(mean, std^2), in pairs on both sides of the mean, for a
    process with these sigma / alpha (T,). For a rectified flow that is the logit-normal distribution of its times (Esser et
    al. 2024, eq. 19), for EDM that of its sigma (Karras et al. 2022, table 1: mean -1.2, std 1.2)."""
    known = np.log(ratios[np.isfinite(ratios)])

    def pairs(rng: np.random.Generator, n: int) -> np.ndarray:
        z = rng.standard_normal((n + 1) // 2)
        z = np.concatenate([z, -z])[:n]
        return np.round(np.interp(mean + std * z, known, np.arange(len(known)))).astype(np.int32)

    return draw_rows(rng, n, pairs)


def nearer_timesteps(t: np.ndarray, stage: float) -> np.ndarray:
    """r = (1 - 2^-stage) t in the time of a schedule that counts from the data, where timestep t is at t + 1: (n,) int32 for
    t (n,), of which -1 is the data (Geng et al. 2024, arXiv 2406.14548, section 3.4, with n(t) = 1)."""
    return np.minimum(np.floor((1 - 2.0**-stage) * (t + 1)) - 1, t - 1).astype(np.int32)


class ImportanceTimesteps:
    """Timesteps with probabilities in proportion to the root mean square of their last `keep` losses (Nichol & Dhariwal
    2021, eq. 18), and uniform until each has `keep` losses. `.parameters` is the state to save in a checkpoint."""

    def __init__(self, T: int, keep: int = 10, uniform_share: float = 0.001):
        self.num_timesteps, self.uniform_share = T, uniform_share
        self.losses = Parameter(Tensor(np.zeros((T, keep), np.float32)), name="timesteps.losses", requires_grad=False)
        self.counts = Parameter(Tensor(np.zeros(T, np.int32)), name="timesteps.counts", requires_grad=False)
        self.parameters = [self.losses, self.counts]

    def probabilities(self) -> np.ndarray:
        """(T,) float64, with sum 1; `uniform_share` of it is uniform, so each timestep is drawn sometimes."""
        losses = self.losses.asnumpy().astype(np.float64)
        if (self.counts.asnumpy() < losses.shape[1]).any():
            return np.full(self.num_timesteps, 1 / self.num_timesteps)
        p = np.sqrt((losses**2).mean(1)) + 1e-12
        return (1 - self.uniform_share) * p / p.sum() + self.uniform_share / self.num_timesteps

    def draw(self, rng: Random, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (n,) int32, and the weights 1 / (T p_t), (n,) float32, that make the mean weighted loss unbiased."""
        p = self.probabilities()
        t = rng.choice(self.num_timesteps, n, p=p)
        return t.astype(np.int32), (1 / (self.num_timesteps * p[t])).astype(np.float32)

    def update(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Record the losses (n,) of the timesteps t (n,), except non-finite ones; a loss replaces its timestep's oldest."""
        table, counts = self.losses.asnumpy().copy(), self.counts.asnumpy().copy()
        finite = np.isfinite(losses)
        for step, loss in zip(t[finite], losses[finite], strict=True):
            table[step, counts[step] % table.shape[1]] = loss
            counts[step] += 1
        self.losses.set_data(Tensor(table))
        self.counts.set_data(Tensor(counts))


def offset_noise(rng: Random, shape: Sequence[int], strength: float) -> np.ndarray:
    """N(0, 1) noise (B, C, H, W) float32, plus `strength` times one N(0, 1) number per image and channel, so that the model
    also learns the mean brightness (Guttenberg 2023, "Diffusion with offset noise"). Strength 0 is plain noise."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if strength:
        noise += np.float32(strength) * rng.standard_normal((*shape[:2], *[1] * (len(shape) - 2)), dtype=np.float32)
    return noise


def drop_labels(rng: Random, labels: np.ndarray, probability: float, null: Any) -> np.ndarray:
    """Labels, or other rows, (B, ...); each sample's are replaced by `null` with this probability, to train for guidance (Ho
    & Salimans 2021)."""
    chosen = rng.random(len(labels)).reshape(-1, *[1] * (labels.ndim - 1)) < probability
    return np.where(chosen, null, labels).astype(labels.dtype if labels.dtype.kind == "f" else np.int32)
