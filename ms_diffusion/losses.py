"""Errors of a prediction, and the losses of an autoencoder and its discriminator. All take tensors; none knows a network.

Errors are element by element: (pred, target) of any shape -> the same shape.

An autoencoder and its discriminator have an optimizer each, whose steps take turns (Rombach et al. 2022, appendix G). The
first is the autoencoder's and logvar's, of `autoencoder_loss` and a weight times `generator_loss`; the second the
discriminator's, of `discriminator_loss`, to which the first one's reconstructions are constants. The weight is
`adaptive_weight`, which is a constant to the first: gradients at the decoder's last layer give it, before that step.
`tasks.autoencoder_losses` puts networks to it.
"""

from mindspore import ops


def l1(pred, target):
    """|pred - target|."""
    return ops.abs(pred - target)


def l2(pred, target):
    """(pred - target)^2."""
    return ops.square(pred - target)


def huber(pred, target):
    """Half the square below an error of 1, linear above (Huber 1964; PyTorch's smooth_l1_loss)."""
    error = ops.abs(pred - target)
    return ops.where(error < 1, 0.5 * error * error, error - 0.5)


LOSSES = {"l1": l1, "l2": l2, "huber": huber}


# The autoencoder's


def autoencoder_loss(x, reconstruction, kl, logvar, kl_weight, perceptual=0.0):
    """All but the adversarial part: the negative log-likelihood of x, summed over an image, plus kl_weight KL: ().

    The error is |x - reconstruction| + perceptual, at each element, and its negative log-likelihood that of a Laplace
    distribution with a learned log-scale: error / exp(logvar) + logvar. The KL does not know the decoder, so at its last
    layer the gradient is the likelihood's alone.

    Args:
        x, reconstruction: (B, C, H, W).
        kl: (B,), the divergence of each image's latent from N(0, 1), or 0.
        logvar: (), a parameter of the training, from 0 on.
        perceptual: (B,), `LPIPS` of the two times its weight, or 0.
    """
    error = l1(reconstruction, x).mean((1, 2, 3)) + perceptual
    nll = error / ops.exp(logvar) + logvar  # (B,), mean over an image
    return (nll * (x.size // x.shape[0]) + kl_weight * kl).mean()


def generator_loss(logits_fake):
    """-mean of the discriminator's logits of reconstructions: ()."""
    return -logits_fake.mean()


def adaptive_weight(nll_grads, g_grads, disc_weight=1.0):
    """disc_weight |nll_grads| / |g_grads|, the ratio at most 1e4: () (Esser et al. 2021, eq. 7).

    Of the gradients of `autoencoder_loss` and `generator_loss` by the weight of the decoder's last layer.
    """
    return disc_weight * ops.clamp(norm(nll_grads) / (norm(g_grads) + 1e-4), 0.0, 1e4)


def norm(x):
    return ops.sqrt(ops.square(x).sum())


# The discriminator's


def hinge_d_loss(logits_real, logits_fake):
    """The mean of max(0, 1 - real) and max(0, 1 + fake): (Lim & Ye 2017, halved)."""
    return 0.5 * (ops.relu(1 - logits_real).mean() + ops.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real, logits_fake):
    """Cross-entropy of real against fake, the mean of both kinds (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * (ops.softplus(-logits_real).mean() + ops.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def discriminator_loss(logits_real, logits_fake, disc_factor, d_loss=hinge_d_loss):
    """disc_factor times one of `D_LOSSES`: ()."""
    return disc_factor * d_loss(logits_real, logits_fake)
