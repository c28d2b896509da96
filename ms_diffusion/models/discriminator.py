"""The PatchGAN discriminator: is a patch of an image real or generated (Isola et al. 2017, section 3.2)? As in taming."""

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ..runtime import gather
from .layers import BatchNorm, LeakyReLU, conv2d, name_and_initialise


class ActNorm(nn.Cell):
    """scale (x + loc), both one number per channel (Kingma & Dhariwal 2018, section 3.1): (B, C, H, W) -> the same.

    Both are trained, from values that `initialise` derives from data. The parameter `initialized` records that this has
    been done, also in a checkpoint.
    """

    def __init__(self, channels: int):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.loc = Parameter(Tensor(np.zeros(shape, np.float32)), name="loc")
        self.scale = Parameter(Tensor(np.ones(shape, np.float32)), name="scale")
        self.initialized = Parameter(Tensor(np.uint8(0)), name="initialized", requires_grad=False)

    def initialise(self, x: Tensor) -> None:
        """Set scale and loc so that all ranks' x are mapped to mean 0 and variance 1; only the first call with finite x has
        an effect."""
        if self.initialized.asnumpy() == 0:
            a = gather(x.asnumpy())  # (ranks, B, C, H, W)
            a = a.reshape(-1, *a.shape[2:])
            if not np.isfinite(a).all():
                return
            ops.assign(self.loc, Tensor(-a.mean((0, 2, 3), keepdims=True)))
            ops.assign(self.scale, Tensor(1 / (a.std((0, 2, 3), ddof=1, keepdims=True) + 1e-6)))
            ops.assign(self.initialized, Tensor(np.uint8(1)))

    def construct(self, x: Tensor) -> Tensor:
        return self.scale * (x + self.loc)


NORMS = {"batch": BatchNorm, "act": ActNorm}


class NLayerDiscriminator(nn.Cell):
    """Images (B, channels, H, W) -> logits (B, 1, H', W'), one per patch, that the patch is real.

    H' is H / 2^n_layers - 2; with 3 layers a patch has 70 x 70 pixels. A condition is concatenated to the images:
    ``ops.concat((images, cond), 1)``. A new network is in training mode, as in PyTorch. With norm "act", call `initialise`
    before the first step.

    Args:
        channels: channels of the images plus those of the condition.
        ndf: channels after the first convolution; each following convolution doubles them, up to 8 ndf.
        n_layers: number of convolutions with a norm. The first convolution and all of these but the last halve H and W.
        norm: "batch" or "act".
        seed: determines the initial weights: N(0, 0.02), N(1, 0.02) for norms, PyTorch's defaults for biases.

    Raises:
        ValueError: `norm` is unknown.
    """

    def __init__(self, channels: int, ndf: int, n_layers: int, norm: str = "batch", seed: int = 0):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}: choose one of {', '.join(NORMS)}")
        layers, width = [conv2d(channels, ndf, 4, 2, 1), LeakyReLU(0.2)], ndf
        for n in range(1, n_layers + 1):
            c_in, width = width, ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [conv2d(c_in, width, 4, stride, 1, bias=norm == "act"), NORMS[norm](width), LeakyReLU(0.2)]
        self.main = nn.SequentialCell(*layers, conv2d(width, 1, 4, 1, 1))
        name_and_initialise(self, seed)
        rng = np.random.default_rng((seed, 1))
        for p in self.trainable_params():
            if p.name.endswith("weight"):
                p.set_data(Tensor(rng.normal(0 if p.ndim == 4 else 1, 0.02, p.shape).astype(np.float32)))
        self.set_train()

    @property
    def statistics(self) -> list[Parameter]:
        """The running statistics of the batch norms, which each call in training changes."""
        norms = [layer for layer in self.main if isinstance(layer, BatchNorm)]
        return [p for norm in norms for p in (norm.running_mean, norm.running_var)]

    def initialise(self, x: Tensor) -> None:
        """Initialise each ActNorm from its input for the images x; those that have been initialised stay as they are."""
        if all(layer.initialized.asnumpy() for layer in self.main if isinstance(layer, ActNorm)):
            return
        for layer in self.main:
            if isinstance(layer, ActNorm):
                layer.initialise(x)
            x = layer(x)

    def construct(self, x: Tensor) -> Tensor:
        return ops.cast(self.main(x), ms.float32)
