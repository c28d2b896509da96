"""The networks in PyTorch: the tests compare ours with them, `torch_work` trains them for the speed comparison.

The U-Net has the architecture and the state-dict paths of Rogge & Rasul, "The Annotated Diffusion Model" (Hugging Face blog,
2022), `MLP` those of the S-curve experiment.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class SinusoidalPositionEmbeddings(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.half = dim // 2

    def forward(self, t):
        exponents = torch.arange(self.half, device=t.device, dtype=t.dtype) / (self.half - 1)
        angles = torch.outer(t, 10000.0**-exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return x + self.fn(x)


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.fn = fn
        self.norm = nn.GroupNorm(1, dim)

    def forward(self, x):
        return self.fn(self.norm(x))


class Attention(nn.Module):
    """Softmax attention between all positions, by PyTorch's own kernel."""

    def __init__(self, dim, heads=4, dim_head=32):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(batch, 3, self.heads, self.dim_head, -1).mT.unbind(1)  # (B, h, N, d)
        out = F.scaled_dot_product_attention(q, k, v).mT  # (B, h, d, N)
        return self.to_out(out.reshape(batch, -1, height, width))


class LinearAttention(nn.Module):
    """Shen et al. 2018: softmax of q over channels and of k over positions; q (k^T v) needs no N x N matrix."""

    def __init__(self, dim, heads=4, dim_head=32):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), nn.GroupNorm(1, dim))

    def forward(self, x):
        batch, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(batch, 3, self.heads, self.dim_head, -1).unbind(1)  # (B, h, d, N)
        q = q.softmax(2) / math.sqrt(self.dim_head)
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(3), v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(out.reshape(batch, -1, height, width))


class Block(nn.Module):
    def __init__(self, dim, dim_out, groups):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)

    def forward(self, x, scale=0, shift=0):
        return F.silu(self.norm(self.proj(x)) * (1 + scale) + shift)


class ResnetBlock(nn.Module):
    def __init__(self, dim, dim_out, time_emb_dim=None, groups=8, scale_shift=False):
        super().__init__()
        self.scale_shift = scale_shift
        if time_emb_dim:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * (1 + scale_shift)))
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x, emb=None):
        if emb is None:
            h = self.block1(x)
        elif self.scale_shift:
            h = self.block1(x, *self.mlp(emb)[:, :, None, None].chunk(2, dim=1))
        else:
            h = self.block1(x) + self.mlp(emb)[:, :, None, None]
        return self.block2(h) + self.res_conv(x)


class ConvNextBlock(nn.Module):
    def __init__(self, dim, dim_out, time_emb_dim=None, mult=2):
        super().__init__()
        if time_emb_dim:
            self.mlp = nn.Sequential(nn.GELU(), nn.Linear(time_emb_dim, dim))
        self.ds_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        inner = dim_out * mult
        wide = nn.GroupNorm(1, dim), nn.Conv2d(dim, inner, 3, padding=1), nn.GELU()
        self.net = nn.Sequential(*wide, nn.GroupNorm(1, inner), nn.Conv2d(inner, dim_out, 3, padding=1))
        self.res_conv = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x, emb=None):
        h = self.ds_conv(x)
        if emb is not None:
            h = h + self.mlp(emb)[:, :, None, None]
        return self.net(h) + self.res_conv(x)


class Unet(nn.Module):
    """(B, channels, H, W) and float timesteps (B,) -> (B, out_dim, H, W); conditions as in `models.unet.Unet`."""

    def __init__(
        self,
        dim,
        init_dim=None,
        out_dim=None,
        dim_mults=(1, 2, 4),
        channels=1,
        with_time_emb=True,
        resnet_block_groups=8,
        use_convnext=True,
        convnext_mult=2,
        scale_shift=False,
        final_skip=False,
        patch_size=1,
        num_classes=None,
        cond_channels=0,
        self_condition=False,
        vocab_size=0,
        max_length=0,
        text_dim=128,
    ):
        super().__init__()
        if vocab_size:
            raise ValueError("captions are not implemented here: choose another network")
        self.patch_size = patch_size

        def block(dim_in, dim_out, time_emb_dim=dim * 4 if with_time_emb else None):
            if use_convnext:
                return ConvNextBlock(dim_in, dim_out, time_emb_dim, convnext_mult)
            return ResnetBlock(dim_in, dim_out, time_emb_dim, resnet_block_groups, scale_shift)

        def linear_attention(width):
            return Residual(PreNorm(width, LinearAttention(width)))

        widths = [dim * mult for mult in dim_mults]
        first = init_dim or dim // 3 * 2
        channels_in = channels + cond_channels + channels * self_condition
        self.init_conv = nn.Conv2d(channels_in * patch_size**2, first, 7, padding=3)
        self.time_mlp = None
        if with_time_emb:
            self.time_mlp = nn.Sequential(
                SinusoidalPositionEmbeddings(dim), nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim * 4)
            )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes + 1, dim * 4)

        self.downs = nn.ModuleList()
        for below, width in zip([first] + widths, widths, strict=False):
            half = nn.Identity() if len(self.downs) == len(widths) - 1 else nn.Conv2d(width, width, 4, 2, 1)
            self.downs.append(nn.ModuleList([block(below, width), block(width, width), linear_attention(width), half]))

        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        self.mid_attn = Residual(PreNorm(middle, Attention(middle)))
        self.mid_block2 = block(middle, middle)

        self.ups = nn.ModuleList()
        for above, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            double = nn.ConvTranspose2d(width, width, 4, 2, 1)
            self.ups.append(nn.ModuleList([block(above * 2, width), block(width, width), linear_attention(width), double]))

        self.final_skip = final_skip
        last = dim + first * final_skip
        self.final_conv = nn.Sequential(block(last, dim, None), nn.Conv2d(dim, (out_dim or channels) * patch_size**2, 1))

    def forward(self, x, t, *cond):
        emb = None if self.time_mlp is None else self.time_mlp(t)
        if self.label_emb is not None:
            emb = emb + self.label_emb(cond[0])
            cond = cond[1:]
        if cond:
            x = torch.cat([x, *cond], dim=1)
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        x = self.init_conv(x)
        skips, first = [], x
        for block1, block2, attention, half in self.downs:
            x = attention(block2(block1(x, emb), emb))
            skips.append(x)
            x = half(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, emb)), emb)
        for block1, block2, attention, double in self.ups:
            x = torch.cat([x, skips.pop()], dim=1)
            x = double(attention(block2(block1(x, emb), emb)))
        x = self.final_conv(torch.cat([x, first], dim=1) if self.final_skip else x)
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x


class MLP(nn.Module):
    """The network of the S-curve experiment."""

    def __init__(self, dim=128, num_embeddings=100):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(2, dim), nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 2)])
        self.step_embeddings = nn.ModuleList([nn.Embedding(num_embeddings, dim) for _ in range(3)])

    def forward(self, x, t):
        for linear, embedding in zip(self.linears, self.step_embeddings, strict=False):
            x = F.relu(linear(x) + embedding(t))
        return self.linears[3](x)


class ResidualBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.time, self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, emb):
        h = self.linear1(F.silu(x)) + self.time(F.silu(emb))
        return x + self.linear2(F.silu(h))


class ResidualMLP(nn.Module):
    def __init__(self, dim=128, depth=3, frequencies=4, num_embeddings=1000):
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(frequencies), persistent=False)
        every_t = SinusoidalPositionEmbeddings(dim)(torch.arange(num_embeddings, dtype=torch.float32))
        self.register_buffer("time_embeddings", every_t, persistent=False)
        self.time_mlp = nn.Linear(dim, dim)
        self.first = nn.Linear(2 + 4 * frequencies, dim)
        self.blocks = nn.ModuleList([ResidualBlock(dim) for _ in range(depth)])
        self.last = nn.Linear(dim, 2)

    def forward(self, x, t):
        emb = self.time_mlp(self.time_embeddings[t])
        angles = (x[:, :, None] * self.frequencies.to(x.dtype)).flatten(1)
        x = self.first(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            x = block(x, emb)
        return self.last(F.silu(x))
