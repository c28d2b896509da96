"""Networks as ``nn.Cell``. They know nothing of diffusion or training."""
