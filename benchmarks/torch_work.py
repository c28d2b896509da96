"""PyTorch's side of the speed comparison, in eager mode: the same work as `ms_diffusion.commands.benchmark` times."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .torch_peer import MLP, DiT, ResidualMLP, Unet


class Trainer:
    """A network, its moving average and Adam."""

    def __init__(self, kind: type[nn.Module], model: dict, device: str):
        torch.manual_seed(0)
        self.device = "cuda" if device == "gpu" else "cpu"
        self.net = kind(**model).to(self.device)
        self.ema = copy.deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def update(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 0.001)
        return loss.item()


class PointsWork(Trainer):
    """A training epoch of `num` points."""

    def __init__(self, model: dict, num: int, batch_size: int, device: str = "cpu"):
        super().__init__(ResidualMLP if "depth" in model else MLP, model, device)
        T = model["num_embeddings"]
        betas = torch.sigmoid(torch.linspace(-6, 6, T, device=self.device)) * 20 / T
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)[:, None]
        self.points, self.batch_size = torch.rand(num, 2, device=self.device) * 2 - 1, batch_size

    def epoch(self) -> float:
        order = torch.randperm(len(self.points))
        for i in range(0, len(order), self.batch_size):
            x = self.points[order[i : i + self.batch_size]]
            t = torch.randint(0, len(self.alphas_cumprod), ((len(x) + 1) // 2,), device=self.device)
            t = torch.cat([t, len(self.alphas_cumprod) - 1 - t])[: len(x)]
            noise, alpha_bar = torch.randn_like(x), self.alphas_cumprod[t]
            x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
            loss = self.update(F.mse_loss(self.net(x_t, t), noise))
        return loss


class ImageWork(Trainer):
    """A training step, a forward pass, DDIM sampling of size x size images."""

    def __init__(self, model: dict, size: int, batch_size: int, device: str = "cpu"):
        super().__init__(DiT if "hidden_size" in model else Unet, model, device)
        betas = torch.linspace(1e-4, 0.02, 1000, device=self.device)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        shape = (batch_size, model["channels"], size, size)
        self.x, self.noise = torch.rand(shape, device=self.device) * 2 - 1, torch.randn(shape, device=self.device)
        self.t = torch.randint(0, len(betas), (batch_size,), device=self.device)
        classes = model["num_classes"]
        self.labels = [] if classes is None else [torch.randint(0, classes, (batch_size,), device=self.device)]

    def step(self) -> float:
        alpha_bar = self.alphas_cumprod[self.t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * self.x + (1 - alpha_bar).sqrt() * self.noise
        return self.update(F.smooth_l1_loss(self.net(x_t, self.t.float(), *self.labels), self.noise))

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.net(self.x, self.t.float(), *self.labels).cpu()

    @torch.no_grad()
    def sample(self, steps: int) -> torch.Tensor:
        x = torch.randn_like(self.x)
        timesteps = np.round(np.linspace(len(self.alphas_cumprod) - 1, 0, steps)).astype(int)
        for i, t in enumerate(timesteps):
            alpha_bar = self.alphas_cumprod[t]
            next_alpha_bar = self.alphas_cumprod[timesteps[i + 1]] if i + 1 < steps else torch.ones_like(alpha_bar)
            eps = self.net(x, torch.full((len(x),), float(t), device=self.device), *self.labels)
            x_start = ((x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()).clamp(-1, 1)
            eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
            x = next_alpha_bar.sqrt() * x_start + (1 - next_alpha_bar).sqrt() * eps
        return x.cpu()


def make_work(record: dict, batch_size: int, device: str) -> Trainer:
    """What PyTorch's worker times, from a run's configuration."""
    kind, num = (ImageWork, "size") if record["kind"] == "pixels" else (PointsWork, "num")
    return kind(record["model"], record["data"][num], batch_size, device)
