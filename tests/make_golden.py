"""Write golden_unet.npz: what the PyTorch U-Net answers in float64. ``python tests/make_golden.py`` (needs torch).

The file holds answers only. Weights, images and directions are redrawn from names and shapes by the rules below, which
use nothing but the uniform numbers of ``numpy.random.default_rng``. For each case "kind-batch-size" it stores

    .../output       the network's output (float32)
    .../gradients    one row for each parameter, in sorted order: the norm of its gradient, and the gradient's product
                     with ``direction``; the gradient is that of sum(output * cotangent)
"""

from itertools import product
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("golden_unet.npz")
KINDS = {"convnext": {}, "resnet": {"use_convnext": False, "resnet_block_groups": 4}}
CASES = [(kind, batch, size) for kind, batch, size in product(KINDS, (1, 13), (28, 32))]


def uniform(seed, shape) -> np.ndarray:
    """U(-1, 1)."""
    return 2 * np.random.default_rng(seed).random(shape) - 1


def draw_weights(shapes: dict) -> dict[str, np.ndarray]:
    """PyTorch's default law for matrices and kernels, U(-1, 1) / sqrt(fan_in); biases near 0 and norm weights near 1."""
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        if len(shape) > 1:
            value = uniform([1, i], shape) / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.1 * uniform([1, i], shape) + (1 if name.endswith("weight") else 0)
        weights[name] = value.astype(np.float32)
    return weights


def draw_batch(batch: int, size: int, channels: int = 1, out_channels: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images x, timesteps t below 200, and the cotangent of the output."""
    x = uniform([2, batch, size], (batch, channels, size, size)).astype(np.float32)
    t = (200 * np.random.default_rng([3, batch]).random(batch)).astype(np.int32)
    cotangent = uniform([4, batch, size], (batch, out_channels, size, size)).astype(np.float32)
    return x, t, cotangent


def gradient_rows(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """(norm, product with a direction of unit variance) of each gradient, sorted by name."""
    rows = []
    for i, name in enumerate(sorted(gradients)):
        gradient = np.asarray(gradients[name], np.float64)
        direction = np.sqrt(3) * uniform([5, i], gradient.shape)
        rows.append((np.linalg.norm(gradient), (gradient * direction).sum()))
    return np.array(rows)


def main():
    import torch

    from benchmarks.torch_peer import Unet

    answers = {}
    for kind, batch, size in CASES:
        net = Unet(28, **KINDS[kind]).double()
        weights = draw_weights({name: p.shape for name, p in net.named_parameters()})
        net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        x, t, cotangent = (torch.from_numpy(a).double() for a in draw_batch(batch, size))
        output = net(x, t)
        (output * cotangent).sum().backward()
        answers[f"{kind}-{batch}-{size}/output"] = output.detach().numpy().astype(np.float32)
        answers[f"{kind}-{batch}-{size}/gradients"] = gradient_rows({n: p.grad.numpy() for n, p in net.named_parameters()})
    np.savez_compressed(PATH, **answers)


if __name__ == "__main__":
    main()
