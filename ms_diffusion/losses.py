"""Errors of a prediction, and the losses of an autoencoder and its discriminator. All take tensors; none knows a network.

Errors are element by element: (pred, target) of any shape -> the same shape.

An autoencoder is trained (Rombach et al. 2022, appendix G) by two steps that take turns. The first is the autoencoder's and
logvar's. Its adversarial part is weighed by gradients at the decoder's last layer (Esser et al. 2021, eq. 7), so the chain
rule is cut there, and one pass through the rest of the autoencoder does for both parts: `body` gives what the last layer
takes, h, and the KL; each value_and_grad is by h or h and KL, and by the parameters of the last layer and logvar.

    h, kl = body(x, noise)
    loss, ((h_grad, kl_grad), grads) = value_and_grad of autoencoder_loss(x, last(h), kl, logvar, ...)
    g_loss, (g_h_grad, g_grads) = value_and_grad of generator_loss(discriminator(last(h)))
    weight = adopt_weight(disc_factor, step, disc_start) * adaptive_weight(grads[0], g_grads[0], disc_weight)
    body_grads = grad of (h * (h_grad + weight * g_h_grad)).sum() + (kl * kl_grad).sum(), with h, kl = body(x, noise)
    the optimizer of the autoencoder takes body_grads and grads + weight * g_grads

In a compiled graph the two calls of body become one; with dropout in it they would be two, of different masks. The second
step is the discriminator's, of reconstructions that are constants to it, such as those of the first step; a conditional one
is given ``ops.concat((images, cond), 1)`` throughout.

    discriminator_loss(discriminator(x), discriminator(reconstruction), adopt_weight(disc_factor, step, disc_start))
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
        kl: (B,), the divergence of each image's latent from N(0, 1).
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


def adopt_weight(weight, step, threshold, value=0.0):
    """`weight` from step `threshold` on, `value` before: (). `step` is an int Tensor ()."""
    return ops.where(step < threshold, value, weight)


# The discriminator's


def hinge_d_loss(logits_real, logits_fake):
    """The mean of max(0, 1 - real) and max(0, 1 + fake): (Lim & Ye 2017, halved)."""
    return 0.5 * (ops.relu(1 - logits_real).mean() + ops.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real, logits_fake):
    """Cross-entropy of real against fake, the mean of both kinds (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * (ops.softplus(-logits_real).mean() + ops.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def discriminator_loss(logits_real, logits_fake, disc_factor, d_loss=hinge_d_loss):
    """disc_factor, which is 0 before the discriminator's start (`adopt_weight`), times one of `D_LOSSES`: ()."""
    return disc_factor * d_loss(logits_real, logits_fake)
