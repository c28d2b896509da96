"""A small classifier of 28 x 28 gray images; its features measure the distance between two sets of images offline."""

from pathlib import Path

from mindspore import Tensor, nn, ops

from ..convert import load_into, load_torch_state_dict
from .layers import GroupNorm, Linear, conv2d, name_and_initialise

BUNDLED = Path(__file__).parents[1] / "weights" / "classifier.safetensors"


class ConvNorm(nn.Cell):
    """Convolution, GroupNorm, SiLU: (B, c_in, H, W) -> (B, c_out, H', W')."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = conv2d(c_in, c_out, kernel, stride, padding=1, bias=False)
        self.norm = GroupNorm(8, c_out, activation="silu-after")

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Classifier(nn.Cell):
    """Images (B, channels, H, W) in [-1, 1], of 28 x 28 pixels for the bundled weights -> logits (B, classes).

    Three stages, (B, 32, H, W), (B, 64, H/2, W/2) and (B, 128, H/4, W/4); the second and the third have a shortcut over two
    convolutions. The features (B, 128) are the mean of the third stage over H and W; a linear layer maps them to the logits.
    """

    num_features = 128

    def __init__(self, classes: int = 10, seed: int = 0, channels: int = 1):
        super().__init__()
        self.conv1 = nn.SequentialCell(ConvNorm(channels, 32), ConvNorm(32, 32))
        self.down2, self.conv2 = ConvNorm(32, 64, 4, 2), nn.SequentialCell(ConvNorm(64, 64), ConvNorm(64, 64))
        self.down3, self.conv3 = ConvNorm(64, 128, 4, 2), nn.SequentialCell(ConvNorm(128, 128), ConvNorm(128, 128))
        self.head = Linear(128, classes)
        name_and_initialise(self, seed)

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activations of all three stages."""
        x1 = self.conv1(x)
        x2 = self.down2(x1)
        x2 = x2 + self.conv2(x2)
        x3 = self.down3(x2)
        return x1, x2, x3 + self.conv3(x3)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = ops.mean(self.stages(x)[2], (2, 3))
        return features, self.head(features)

    def construct(self, x: Tensor) -> Tensor:
        return self.features_and_logits(x)[1]


def load_classifier(path: Path = BUNDLED) -> Classifier:
    """The bundled classifier, or one of `train_classifier`, in evaluation mode; UserError if the file cannot be loaded."""
    net = Classifier()
    load_into(net, load_torch_state_dict(path))
    return net.set_train(False)
