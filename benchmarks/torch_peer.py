"""The networks in PyTorch: the tests compare ours with them, `torch_work` trains them for the speed comparison.

The U-Net has the architecture and the state-dict paths of Rogge & Rasul, "The Annotated Diffusion Model" (Hugging Face blog,
2022), `DiT` those of Peebles & Xie 2023, `MLP` those of the S-curve experiment.
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
        fourier_features=0,
    ):
        super().__init__()
        if vocab_size:
            raise ValueError("captions are not implemented here: choose another network")
        self.patch_size, self.fourier_features = patch_size, fourier_features

        def block(dim_in, dim_out, time_emb_dim=dim * 4 if with_time_emb else None):
            if use_convnext:
                return ConvNextBlock(dim_in, dim_out, time_emb_dim, convnext_mult)
            return ResnetBlock(dim_in, dim_out, time_emb_dim, resnet_block_groups, scale_shift)

        def linear_attention(width):
            return Residual(PreNorm(width, LinearAttention(width)))

        widths = [dim * mult for mult in dim_mults]
        first = init_dim or dim // 3 * 2
        channels_in = channels + cond_channels + channels * self_condition + channels * 2 * fourier_features
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
        phases = [(x + 1) * (2 * math.pi * 127.5 / 2**i) for i in range(self.fourier_features)]
        x = torch.cat([x, *(f(phase) for phase in phases for f in (torch.sin, torch.cos)), *cond], dim=1)
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


class DiTAttention(nn.Module):
    """Softmax attention between all tokens, by PyTorch's own kernel."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiTMlp(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(nn.Module):
    """A layer with a modulation in `parts` parts, each (B, 1, dim)."""

    def __init__(self, dim, parts):
        super().__init__()
        self.parts = parts
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))

    def modulation(self, emb):
        return self.adaLN_modulation(emb)[:, None].chunk(self.parts, dim=-1)

    def norm(self, x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(Modulated):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__(dim, 6)
        self.attn = DiTAttention(dim, heads)
        self.mlp = DiTMlp(dim, int(dim * mlp_ratio))

    def forward(self, x, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        x = x + gate1 * self.attn(self.norm(x, shift1, scale1))
        return x + gate2 * self.mlp(self.norm(x, shift2, scale2))


class DiTFinalLayer(Modulated):
    def __init__(self, dim, dim_out):
        super().__init__(dim, 2)
        self.linear = nn.Linear(dim, dim_out)

    def forward(self, x, emb):
        return self.linear(self.norm(x, *self.modulation(emb)))


class DiT(nn.Module):
    """(B, channels, H, W) and float timesteps (B,) -> (B, out_dim, H, W); conditions as in `models.dit.DiT`. A caption is
    embedded by `text_emb`, which the caller sets."""

    def __init__(
        self,
        hidden_size=192,
        depth=6,
        num_heads=6,
        mlp_ratio=4.0,
        patch_size=2,
        channels=1,
        out_dim=None,
        num_classes=None,
        vocab_size=0,
        max_length=0,
        text_dim=128,
        cond_channels=0,
        self_condition=False,
    ):
        super().__init__()
        self.patch_size, self.text_emb, dim = patch_size, None, hidden_size
        self.t_embedder, self.x_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = None
        if num_classes is not None:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, dim)
        channels_in = channels + cond_channels + channels * self_condition
        self.x_embedder.proj = nn.Conv2d(channels_in, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = DiTFinalLayer(dim, patch_size**2 * (out_dim or channels))

    def positions(self, rows, columns, device):
        """The sines and cosines of each token's column, then those of its row, (1, N, dim)."""
        quarter = self.x_embedder.proj.out_channels // 4
        frequencies = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float64) / quarter)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = [torch.outer(place.flatten().double(), frequencies) for place in (x, y)]
        table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
        return table.float().to(device)[None]

    def forward(self, x, t, *cond):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        angles = torch.outer(t, frequencies.to(t))
        emb = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        for embed in (self.y_embedder and self.y_embedder.embedding_table, self.text_emb):
            if embed is not None:
                emb = emb + embed(cond[0])
                cond = cond[1:]
        x = self.x_embedder.proj(torch.cat([x, *cond], dim=1))
        rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(rows, columns, x.device)
        for block in self.blocks:
            x = block(x, emb)
        x = self.final_layer(x, emb).unflatten(-1, (self.patch_size**2, -1))  # (B, N, p p, C)
        return F.pixel_shuffle(x.permute(0, 3, 2, 1).flatten(1, 2).unflatten(-1, (rows, columns)), self.patch_size)


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
