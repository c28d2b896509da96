"""Softmax attention and linear attention over the H x W positions of a feature map."""

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from .. import kernels
from .layers import GroupNorm, Linear, chunk, conv2d

LOWEST = float(np.finfo(np.float32).min)  # a score that softmax makes 0


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3 h d, H, W) -> q, k, v, each (B, h, d, H W), in float32."""
    b, c, height, width = qkv.shape
    parts = chunk(ops.cast(qkv, ms.float32), 3, 1)
    q, k, v = [part.reshape(b, heads, c // (3 * heads), height * width) for part in parts]
    return q, k, v


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, N, h d) -> (B, h, N, d), in float32."""
    b, n, _ = x.shape
    return ops.cast(x, ms.float32).reshape(b, n, heads, -1).transpose(0, 2, 1, 3)


matmul, matmul_t = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)


def softmax(scores: Tensor, lean: bool = False) -> Tensor:
    """Softmax over the last axis; `lean` is the form for layers that are recomputed.

    The gradient of ``ops.softmax`` subtracts a column from a matrix, and MindSpore's CPU kernel for operands of different
    shapes holds 16 bytes per entry of the result as long as the graph lives (2.7 and 2.10). The lean form avoids that kernel
    but keeps two matrices for the gradient, where ``ops.softmax`` keeps one. Recomputation keeps neither.
    """
    return ops.exp(ops.log_softmax(scores, -1)) if lean else ops.softmax(scores, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, lean: bool = False) -> Tensor:
    """v weighted by softmax(scale q^T k) over N positions (Vaswani et al. 2017, eq. 1): each (B, h, d, N) -> the same."""
    scores = matmul(q.transpose(0, 1, 3, 2) * scale, k)  # (B, h, N, N)
    return matmul_t(v, softmax(scores, lean))


class Attention(nn.Cell):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1): (B, dim, H, W) -> the same."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_qkv = conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = conv2d(heads * dim_head, dim, 1)

    def construct(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        q, k, v = split_heads(self.to_qkv(x), self.heads)  # (B, h, d, N), N = H W
        out = attend(q, k, v, self.scale)  #                 (B, h, d, N)
        return self.to_out(out.reshape(b, -1, height, width))


class LinearAttention(nn.Cell):
    """Attention whose cost is linear in H W (Shen et al. 2018, "Efficient Attention", eq. 4): (B, dim, H, W) -> the same."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_qkv = conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.SequentialCell(conv2d(heads * dim_head, dim, 1), GroupNorm(1, dim))
        self.kernel = kernels.LinearAttention(heads) if kernels.available() else None

    def construct(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        if self.kernel is not None:
            return self.to_out(self.kernel(ops.cast(self.to_qkv(x), ms.float32)))
        q, k, v = split_heads(self.to_qkv(x), self.heads)  #         (B, h, d, N), N = H W
        q = ops.softmax(q.transpose(0, 1, 3, 2), -1) * self.scale  # (B, h, N, d), over the channels
        k = ops.softmax(k, -1)  #                                    (B, h, d, N), over the positions
        out = matmul_t(matmul_t(v, k), q)  #                         (B, h, d, d) times q^T
        return self.to_out(out.reshape(b, -1, height, width))


class TokenAttention(nn.Cell):
    """Multi-head self-attention within each `n` tokens (Vaswani et al. 2017, eq. 1): (B n, dim) -> the same. In the
    `new_order` the numbers of qkv are ordered (q k v, head, d)."""

    new_order = True

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)
        self.kernel = kernels.Attention(heads) if kernels.available() else None

    def construct(self, x: Tensor, n: int) -> Tensor:
        qkv = ops.cast(self.qkv(x), ms.float32).reshape(-1, n, 3 * x.shape[-1])
        if self.kernel is not None:
            return self.proj(self.kernel(qkv).reshape(x.shape))
        q, k, v = [heads_first(part, self.heads) for part in chunk(qkv, 3, -1)]  # (B, h, n, d)
        out = matmul(softmax(matmul_t(q * self.scale, k)), v)  #                     (B, h, n, d)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(x.shape))
