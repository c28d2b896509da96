"""Perceptual distances of images: distances between the activations of a trained network (Zhang et al. 2018, eq. 1)."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from ..convert import load_into, load_torch_state_dict
from .classifier import Classifier
from .layers import Identity, conv2d, freeze, name_and_initialise

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG16's convolutions


def unit(x: Tensor) -> Tensor:
    """x (B, C, H, W) with the channels of each position scaled to length 1.

    The lpips package adds 1e-10 to the length, whose gradient at 0 is not finite; 1e-20 under the root has the same effect.
    """
    x = ops.cast(x, ms.float32)
    return x / ops.sqrt(ops.square(x).sum(1, keepdims=True) + 1e-20)


def differences(stages: Callable[[Tensor], Iterable[Tensor]], x: Tensor, y: Tensor) -> list[Tensor]:
    """Squared differences (B, C, H, W) of the unit-length activations of x and y, for each output of stages(x)."""
    pairs = zip(stages(x), stages(y))  # noqa: B905, since a graph's zip takes no strict
    return [ops.square(unit(a) - unit(b)) for a, b in pairs]


def classifier_distance(classifier: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
    """distance(x, y) between gray images (B, 1, 28, 28) or (B, 1, 32, 32) in [-1, 1] -> (B,) in [0, 4].

    As `LPIPS`, without VGG16: the mean over positions and over the three stages of the classifier, with equal weights of the
    channels. Images of 32 x 32 are cropped to their central 28 x 28 pixels. The classifier is frozen.
    """
    freeze(classifier)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        top, left = (x.shape[2] - 28) // 2, (x.shape[3] - 28) // 2
        x, y = [each[:, :, top : top + 28, left : left + 28] for each in (x, y)]
        d1, d2, d3 = [ops.mean(d.sum(1), (1, 2)) for d in differences(classifier.stages, x, y)]
        return (d1 + d2 + d3) / 3

    return distance


class VGG16(nn.Cell):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015, table 1, D): (B, 3, H, W) -> the activations before each pool.

    The numbers of the layers are torchvision's, the names of the slices taming's.
    """

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for i, channels in enumerate(STAGES, 1):
            first = len(layers)
            layers += [nn.MaxPool2d(2, 2)] if i > 1 else []
            for c in channels:
                layers += [conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
            numbered = OrderedDict((str(n), layers[n]) for n in range(first, len(layers)))
            setattr(self, f"slice{i}", nn.SequentialCell(numbered))

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x1 = self.slice1(x)  #  (B, 64, H, W)
        x2 = self.slice2(x1)  # (B, 128, H/2, W/2)
        x3 = self.slice3(x2)  # (B, 256, H/4, W/4)
        x4 = self.slice4(x3)  # (B, 512, H/8, W/8)
        x5 = self.slice5(x4)  # (B, 512, H/16, W/16)
        return x1, x2, x3, x4, x5


def channel_weights(channels: int) -> nn.Cell:
    """Learned weighted sum over channels: (B, channels, H, W) -> (B, 1, H, W). In PyTorch, layer 0 is a dropout."""
    return nn.SequentialCell(OrderedDict(model=nn.SequentialCell(Identity(), conv2d(channels, 1, 1, bias=False))))


class LPIPS(nn.Cell):
    """Images x and y, both (B, 3, H, W) or (B, 1, H, W), H and W at least 16, in [-1, 1] -> distances (B,).

    VGG16's activations are scaled to unit length over the channels. Their squared differences, weighted by learned weights
    that are not negative, are averaged over H and W and summed over the five stages. All parameters are frozen. `load_lpips`
    loads the weights; a new network has random VGG16 weights and channel weights of 1.

    Raises:
        ValueError: the images are smaller than 16 pixels.
    """

    def __init__(self):
        super().__init__()
        self.shift = Tensor(np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1))  # ImageNet's mean and
        self.scale = Tensor(np.array([0.458, 0.448, 0.450], np.float32).reshape(1, 3, 1, 1))  #    deviation in [-1, 1]
        self.net = VGG16()
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = [channel_weights(channels[-1]) for channels in STAGES]
        name_and_initialise(self, seed=0)
        for p in freeze(self).get_parameters():
            if p.name.startswith("lin"):
                p.set_data(Tensor(np.ones(p.shape, np.float32)))

    def stages(self, x: Tensor) -> tuple[Tensor, ...]:
        if min(x.shape[2:]) < 16:
            raise ValueError("LPIPS needs images of at least 16 x 16 pixels: use larger ones, or classifier_distance")
        return self.net((x - self.shift) / self.scale)  # one channel broadcasts to three

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        d0, d1, d2, d3, d4 = differences(self.stages, x, y)
        weighted = self.lin0(d0), self.lin1(d1), self.lin2(d2), self.lin3(d3), self.lin4(d4)
        return sum([ops.mean(d, (1, 2, 3)) for d in weighted])


def load_lpips(vgg_path: str | Path, lpips_path: str | Path) -> LPIPS:
    """The network with the weights of torchvision's VGG16 (``features.0.weight``, ...) and the lpips package's linear layers
    for it, version 0.1 (``lin0.model.1.weight``, ...). Only .pth files, not .safetensors with the same names, need PyTorch.

    Raises:
        UserError: a file cannot be read or contains another network.
    """
    net = LPIPS()
    numbers = {f"features.{p.name.split('.', 2)[2]}": p.name for p in net.net.get_parameters()}
    vgg = {numbers.get(name, name): a for name, a in load_torch_state_dict(vgg_path).items() if "classifier" not in name}
    linear, lins = load_torch_state_dict(lpips_path), [p for p in net.get_parameters() if p.name.startswith("lin")]
    load_into(net.net, vgg, "give torchvision's vgg16-397923af.pth", vgg_path)
    load_into(lins, linear, "give the lpips package's weights/v0.1/vgg.pth", lpips_path)
    return net
