"""Tools of this repository, not of the wheel: speed against PyTorch, sampler errors, what the package's files came from."""

import ms_diffusion  # noqa: F401  # before mindspore, whose settings it makes
