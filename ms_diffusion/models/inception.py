"""Inception v3 for the Frechet inception distance: TensorFlow's graph of 2015 with pytorch-fid's parameter names.

Szegedy et al. 2016, "Rethinking the Inception architecture". The graph differs from the paper in two ways: its average pools
do not count the padding, and its last block uses a maximum pool. The blocks come first, then the network.
"""

from functools import partial
from pathlib import Path

from mindspore import Tensor, nn, ops

from ..convert import load_into, load_torch_state_dict
from ..runtime import UserError
from .layers import BatchNorm

ADVICE = "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
HEAD = (1008, 2048)  # of that file; torchvision's ImageNet weights, of the same names, have 1000 classes


class ConvNorm(nn.Cell):
    """Convolution, batch normalisation, ReLU: (B, c_in, H, W) -> (B, c_out, H', W').

    `padding` has TensorFlow's names: "same" keeps H and W at stride 1, "valid" is no padding.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: str = "same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, has_bias=False)
        self.bn = BatchNorm(c_out, eps=0.001, frozen=True)

    def construct(self, x: Tensor) -> Tensor:
        return ops.relu(self.bn(self.conv(x)))


class Block(nn.Cell):
    """Parallel branches, concatenated: (B, c_in, H, W) -> (B, sum of the branches' channels, H', W').

    The last branch is `pool`, followed by a convolution to c_pool channels unless c_pool is 0. Every other branch is a list
    of the arguments of its ConvNorms after c_in; the last entry may be a list of two, which are parallel. The ConvNorms are
    named branch_1, branch_2, ..., two parallel ones branch_3a and branch_3b; a single one has the name of the branch.
    """

    def __init__(self, c_in: int, pool: nn.Cell, c_pool: int = 0, **branches: list):
        super().__init__()
        self.branches = []
        for name, (*body, last) in branches.items():
            c, path = c_in, []
            for i, (c_out, *kind) in enumerate(body, 1):
                path.append(self.add(f"{name}_{i}", c, c_out, *kind))
                c = c_out
            last_name = f"{name}_{len(body) + 1}" if body else name
            ends = {"": last} if isinstance(last, tuple) else dict(zip("ab", last, strict=True))
            self.branches.append((path, [self.add(last_name + letter, c, *kind) for letter, kind in ends.items()]))
        self.branches.append(([pool], [self.add("branch_pool", c_in, c_pool)]) if c_pool else ([], [pool]))

    def add(self, name: str, *args) -> ConvNorm:
        setattr(self, name, ConvNorm(*args))
        return getattr(self, name)

    def construct(self, x: Tensor) -> Tensor:
        outputs = ()
        for path, ends in self.branches:
            y = x
            for layer in path:
                y = layer(y)
            for end in ends:
                outputs += (end(y),)
        return ops.concat(outputs, 1)


HALVING = (3, 2, "valid")
ROW, COLUMN = (1, 7), (7, 1)
# 3 x 3 mean over the pixels inside the image: "same" padding does not count in MindSpore's average pool
average = partial(nn.AvgPool2d, 3, 1, "same")


def block_a(c_in: int, c_pool: int) -> Block:
    """(B, c_in, 35, 35) -> (B, 224 + c_pool, 35, 35)."""
    double = [(64,), (96, 3), (96, 3)]
    return Block(c_in, average(), c_pool, branch1x1=[(64,)], branch5x5=[(48,), (64, 5)], branch3x3dbl=double)


def block_b(c_in: int) -> Block:
    """(B, c_in, 35, 35) -> (B, 480 + c_in, 17, 17)."""
    return Block(c_in, nn.MaxPool2d(3, 2), branch3x3=[(384, *HALVING)], branch3x3dbl=[(64,), (96, 3), (96, *HALVING)])


def block_c(c_in: int, c: int) -> Block:
    """(B, c_in, 17, 17) -> (B, 768, 17, 17), with kernels of 1 x 7 and 7 x 1 in c channels."""
    double = [(c,), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)]
    single = [(c,), (c, ROW), (192, COLUMN)]
    return Block(c_in, average(), 192, branch1x1=[(192,)], branch7x7=single, branch7x7dbl=double)


def block_d(c_in: int) -> Block:
    """(B, c_in, 17, 17) -> (B, 512 + c_in, 8, 8)."""
    rows_columns = [(192,), (192, ROW), (192, COLUMN), (192, *HALVING)]
    return Block(c_in, nn.MaxPool2d(3, 2), branch3x3=[(192,), (320, *HALVING)], branch7x7x3=rows_columns)


def block_e(c_in: int, pool: nn.Cell) -> Block:
    """(B, c_in, 8, 8) -> (B, 2048, 8, 8)."""
    cross = [(384, (1, 3)), (384, (3, 1))]
    return Block(c_in, pool, 192, branch1x1=[(320,)], branch3x3=[(384,), cross], branch3x3dbl=[(448,), (384, 3), cross])


class InceptionV3(nn.Cell):
    """Images (B, 1 or 3, H, W) float32 in [-1, 1], of any size -> features of pool3 (B, 2048).

    As in pytorch-fid, the images are first resized to 299 x 299 by bilinear interpolation between pixel centres, without
    antialiasing. Gray images are repeated to three channels.
    """

    features = 2048

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, *HALVING)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.pool = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, 1, "valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = block_b(288), block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = block_c(768, 160), block_c(768, 192), block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average()), block_e(2048, nn.MaxPool2d(3, 1, "same"))
        for name, parameter in self.parameters_and_names():
            parameter.name, parameter.requires_grad = name, False

    def construct(self, images: Tensor) -> Tensor:
        x = ops.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)  # (B, 1 or 3, 299, 299)
        if x.shape[1] == 1:
            x = ops.concat((x, x, x), 1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.pool(x)))  #          (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.pool(x))))  #     (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  #                (B, 2048, 8, 8)
        return ops.mean(x, (2, 3))


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of pytorch-fid's file, or of a .safetensors file with the same names.

    Raises:
        UserError: the file cannot be read or contains another network, such as torchvision's.
    """
    arrays = load_torch_state_dict(path)
    head = arrays.get("fc.weight")
    if head is not None and head.shape != HEAD:
        raise UserError(f"{path}: fc.weight is {head.shape} instead of {HEAD}, so it is another network: {ADVICE}")
    unused = [name for name in arrays if name.startswith(("fc.", "AuxLogits.")) or name.endswith(".num_batches_tracked")]
    net = InceptionV3()
    load_into(net, {name: array for name, array in arrays.items() if name not in unused}, ADVICE, path)
    return net
