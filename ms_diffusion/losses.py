"""Errors of a prediction, and the losses of an autoencoder and its discriminator. All are functions of Tensors.

Errors are computed per element: (pred, target) of any shape -> the same shape.

An autoencoder and its discriminator have one optimizer each, whose steps alternate (Rombach et al. 2022, appendix G). The
autoencoder and logvar minimise `autoencoder_loss`, or a VQModel `vq_loss`, + weight * `generator_loss`. The weight,
`adaptive_weight` of gradients at the decoder's last layer, is computed before the step and is constant in it. Then the
discriminator minimises `discriminator_loss`, where the reconstructions of the first step are constants.
"""

from collections.abc import Callable

from mindspore import Tensor, ops


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """|pred - target|."""
    return ops.abs(pred - target)


def l2(pred: Tensor, target: Tensor) -> Tensor:
    """(pred - target)^2."""
    return ops.square(pred - target)


def huber(pred: Tensor, target: Tensor) -> Tensor:
    """Half the square below an error of 1, linear above (Huber 1964; PyTorch's smooth_l1_loss)."""
    error = ops.abs(pred - target)
    return ops.where(error < 1, 0.5 * error * error, error - 0.5)


LOSSES = {"l1": l1, "l2": l2, "huber": huber}


def reconstruction_error(x: Tensor, reconstruction: Tensor, perceptual: Tensor | float = 0.0,
        pixel_loss: Callable[..., Tensor] = l1, pixel_weight: float = 1.0,
        weights: Tensor | None = None) -> Tensor:  # fmt: skip
    """The mean error of each image's elements, pixel_weight times their `pixel_loss` plus perceptual: (B,).

    Args:
        x, reconstruction: (B, C, H, W).
        perceptual: (B,), the weighted `LPIPS` of x and reconstruction, or 0.
        weights: Weights of the elements' errors, of any shape that (B, C, H, W) broadcasts with."""
    error = pixel_loss(reconstruction, x)
    if weights is None:
        return pixel_weight * error.mean((1, 2, 3)) + perceptual
    perceptual = perceptual if isinstance(perceptual, (int, float)) else perceptual.reshape(-1, 1, 1, 1)
    return (weights * (pixel_weight * error + perceptual)).mean((1, 2, 3))


def laplace_nll(error: Tensor, logvar: Tensor, size: int, weight: Tensor | float = 1.0) -> Tensor:
    """The negative log-likelihood of `size` elements with this mean error under a Laplace distribution, but for a constant:
    size (error / exp(logvar) + logvar), the shape of error. `weight` is the mean of the weights that are in error."""
    return (error / ops.exp(logvar) + weight * logvar) * size


def autoencoder_loss(x: Tensor, reconstruction: Tensor, kl: Tensor | float, logvar: Tensor, kl_weight: float,
        perceptual: Tensor | float = 0.0, pixel_weight: float = 1.0, weights: Tensor | None = None) -> Tensor:  # fmt: skip
    """All but the adversarial part: the negative log-likelihood of x, summed over an image, plus kl_weight KL: ().

    The error of an element is |x - reconstruction| + perceptual. The KL does not depend on the decoder, so the gradient at
    the decoder's last layer is that of the likelihood.

    Args:
        x, reconstruction: (B, C, H, W).
        kl: (B,), the KL divergence of each image's latent from N(0, 1), or 0.
        logvar: (), a trained parameter, initially 0.
        perceptual: (B,), the weighted `LPIPS` of x and reconstruction, or 0.
        pixel_weight: Weight of |x - reconstruction|.
        weights: Weights of the elements' likelihoods, of any shape that (B, C, H, W) broadcasts with. The original weights
            this loss with them, and not the likelihood that `adaptive_weight` takes."""
    error = reconstruction_error(x, reconstruction, perceptual, l1, pixel_weight, weights)
    weight = 1.0 if weights is None else weights.mean()
    return (laplace_nll(error, logvar, x.size // x.shape[0], weight) + kl_weight * kl).mean()


def vq_loss(x: Tensor, reconstruction: Tensor, codebook_loss: Tensor | float, codebook_weight: float = 1.0,
        perceptual: Tensor | float = 0.0, pixel_loss: Callable[..., Tensor] = l1,
        pixel_weight: float = 1.0) -> Tensor:  # fmt: skip
    """The same for a VQModel: the mean of `reconstruction_error` plus codebook_weight codebook_loss: ()."""
    error = reconstruction_error(x, reconstruction, perceptual, pixel_loss, pixel_weight)
    return error.mean() + codebook_weight * codebook_loss


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Minus the mean of the discriminator's logits of reconstructions: ()."""
    return -logits_fake.mean()


def adaptive_weight(nll_grads: Tensor, g_grads: Tensor, disc_weight: float = 1.0) -> Tensor:
    """disc_weight |nll_grads| / |g_grads|, the ratio clipped to 1e4: () (Esser et al. 2021, eq. 7).

    The arguments are the gradients of `autoencoder_loss` and `generator_loss` by the weight of the decoder's last layer."""
    return disc_weight * ops.clamp(norm(nll_grads) / (norm(g_grads) + 1e-4), 0.0, 1e4)


def norm(x: Tensor) -> Tensor:
    return ops.sqrt(ops.square(x).sum())


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of the means of max(0, 1 - real) and max(0, 1 + fake): () (Lim & Ye 2017, halved)."""
    return 0.5 * (ops.relu(1 - logits_real).mean() + ops.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Cross-entropy of real against fake, the mean of both kinds: () (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * (ops.softplus(-logits_real).mean() + ops.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, disc_factor: float, d_loss: Callable[..., Tensor] = hinge_d_loss
) -> Tensor:
    """disc_factor times one of `D_LOSSES`: ()."""
    return disc_factor * d_loss(logits_real, logits_fake)
