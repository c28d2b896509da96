"""Write docs/tour.png, the way of a picture through the library: python -m docs.make_tour."""

from pathlib import Path

import numpy as np

import ms_diffusion as md
from ms_diffusion.runtime import on_device

TIMES = (150, 450, 750)  # of the noised batch
CAPTIONS = (
    "make_dataset\nx_0, a batch",
    *(f"q_sample\nx_t, t = {t}" for t in TIMES),
    f"make_denoiser\npredicted x_0, t = {TIMES[1]}",
    "sample_dpmpp_2m\na new sample",
)


def columns() -> list[np.ndarray]:
    """Four rows of pictures (4, 28, 28), one for each stage."""
    images, labels = md.load_images("fashion-mnist-mini", None, "train", size=28, channels=1)
    rows = [int(np.flatnonzero(labels == label)[0]) for label in (0, 3, 8, 9)]
    x_start, classes = md.to_float(images[rows]), on_device(labels[rows])
    run = md.load("fashion-mnist-large")
    noise = np.random.default_rng(0).standard_normal(x_start.shape, dtype=np.float32)
    timesteps = [on_device(np.full(4, t, np.int32)) for t in TIMES]
    noised = [run.diffusion.q_sample(on_device(x_start), t, on_device(noise)) for t in timesteps]
    predicted = md.make_denoiser(run.diffusion, run.net)(noised[1], TIMES[1], classes).asnumpy()
    drawn = run.sample(4, sampler="dpmpp_2m", steps=15, labels=labels[rows], raw=True)
    floats = [x_start, *(x.asnumpy() for x in noised), predicted, drawn]
    return [md.to_uint8(x)[..., 0] for x in floats]


def main(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, len(CAPTIONS), figsize=(10, 6.9), layout="constrained")
    for column, caption, pictures in zip(axes.T, CAPTIONS, columns(), strict=True):
        column[0].set_title(caption, fontsize=9)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(Path(__file__).parent / "tour.png")
