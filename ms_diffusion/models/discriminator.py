"""PatchGAN's discriminator, which tells real patches from made ones (Isola et al. 2017, section 3.2), as taming's."""

import numpy as np

from mindspore import Parameter, Tensor, nn, ops

from .layers import conv2d, name_and_initialise


class BatchNorm(nn.Cell):
    """``torch.nn.BatchNorm2d`` (Ioffe & Szegedy 2015): (B, C, H, W) -> the same; in training by the batch's statistics, that
    the running ones follow, else by the running ones. PyTorch's ``num_batches_tracked`` is not kept: nothing uses it."""

    def __init__(self, channels: int):
        super().__init__()
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.weight, self.bias = Parameter(Tensor(ones), name="weight"), Parameter(Tensor(zeros), name="bias")
        self.running_mean = Parameter(Tensor(zeros), name="running_mean", requires_grad=False)
        self.running_var = Parameter(Tensor(ones), name="running_var", requires_grad=False)

    def construct(self, x):
        return ops.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training, momentum=0.1, eps=1e-5
        )


class ActNorm(nn.Cell):
    """scale (x + loc) with one scale and loc a channel (Kingma & Dhariwal 2018, section 3.1): (B, C, H, W) -> the same.

    They are learned, and `initialise` sets them from data. `initialized` keeps, also in a checkpoint, that it has.
    """

    def __init__(self, channels: int):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.loc = Parameter(Tensor(np.zeros(shape, np.float32)), name="loc")
        self.scale = Parameter(Tensor(np.ones(shape, np.float32)), name="scale")
        self.initialized = Parameter(Tensor(np.uint8(0)), name="initialized", requires_grad=False)

    def initialise(self, x) -> None:
        """Make mean 0 and variance 1 of x; nothing if that was done before."""
        if self.initialized.asnumpy() == 0:
            x = x.asnumpy()
            std = x.std((0, 2, 3), ddof=1, keepdims=True)
            ops.assign(self.loc, Tensor(-x.mean((0, 2, 3), keepdims=True)))
            ops.assign(self.scale, Tensor(1 / (std + 1e-6)))
            ops.assign(self.initialized, Tensor(np.uint8(1)))

    def construct(self, x):
        return self.scale * (x + self.loc)


NORMS = {"batch": BatchNorm, "act": ActNorm}


class NLayerDiscriminator(nn.Cell):
    """Images (B, channels, H, W) -> logits (B, 1, H', W'), each of whether one patch is real: 70 x 70 pixels at 3 layers.

    H' is H / 2^n_layers - 2. A condition, where there is one, comes as more channels: ``ops.concat((images, cond), 1)``.
    A new network is in training mode, as PyTorch's are. With norm "act", call `initialise` before the first step.

    Args:
        channels: of the images and their condition.
        ndf: channels after the first convolution; each further one doubles them, to 8 ndf at most.
        n_layers: convolutions with a norm; all but the last of them, and the one before them, halve H and W.
        norm: "batch" or "act".
        seed: draws the weights: N(0, 0.02), the norms' N(1, 0.02), and PyTorch's defaults for the biases.

    Raises:
        ValueError: another norm, or no layers.
    """

    def __init__(self, channels: int = 3, ndf: int = 64, n_layers: int = 3, norm: str = "batch", seed: int = 0):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}: choose one of {', '.join(NORMS)}")
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers}: it must be at least 1")
        layers, width = [conv2d(channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2)], ndf
        for n in range(1, n_layers + 1):
            c_in, width = width, ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [conv2d(c_in, width, 4, stride, 1, bias=norm == "act"), NORMS[norm](width), nn.LeakyReLU(0.2)]
        self.main = nn.SequentialCell(*layers, conv2d(width, 1, 4, 1, 1))
        name_and_initialise(self, seed)
        rng = np.random.default_rng((seed, 1))
        for p in self.trainable_params():
            if p.name.endswith("weight"):
                p.set_data(Tensor(rng.normal(0 if p.ndim == 4 else 1, 0.02, p.shape).astype(np.float32)))
        self.set_train()

    def initialise(self, x) -> None:
        """Set each ActNorm that is not yet set so that it makes mean 0 and variance 1 of what it sees of the images x."""
        if all(layer.initialized.asnumpy() for layer in self.main if isinstance(layer, ActNorm)):
            return
        for layer in self.main:
            if isinstance(layer, ActNorm):
                layer.initialise(x)
            x = layer(x)

    def construct(self, x):
        return self.main(x)
