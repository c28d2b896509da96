"""Draw 16 samples from what `ms-diffusion export` wrote: python sample_onnx.py runs/quick/export/denoiser.json [COND.npy]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def predict(net, spec, values):
    """x_0 (B, ...) from the network's prediction of x_0, of the noise, or of v = a x_0 + b noise."""
    (y,) = net.run(None, {each["name"]: values[each["name"]] for each in spec["denoiser"]["inputs"]})
    if spec["objective"] == "x0":
        return y
    t = values["t"][0]
    alpha, sigma = spec["alphas"][t], spec["sigmas"][t]
    a, b = (slope[t] for slope in spec["slopes"]) if spec["objective"] == "v" else (0, 1)
    turn = alpha * b - sigma * a
    return np.float32(b / turn) * values["x_t"] - np.float32(sigma / turn) * y


def sample(path, num=16, steps=50, seed=0, image=None):
    """DDIM (Song et al. 2020, eq. 12): images (num, C, H, W), mostly in [-1, 1], or points (num, 2). Classes take turns;
    `image` (num, C', H, W) is for a network with an image condition."""
    spec = json.loads(Path(path).read_text())
    parts = {p: Path(path).with_name(spec[p]["file"]) for p in ("denoiser", "decoder") if p in spec}
    nets = {name: onnxruntime.InferenceSession(file) for name, file in parts.items()}
    scale, (first, last) = spec.get("guidance", 1), spec.get("guidance_interval") or (0, np.inf)
    cond = {name: np.array(values, np.int32)[np.arange(num) % len(values)] for name, values in spec["examples"].items()}
    uncond = {name: np.full_like(values, spec["null"]) for name, values in cond.items()}
    x = np.stack([np.random.default_rng((seed, i)).standard_normal(spec["shape"], np.float32) for i in range(num)])
    x_start, times = np.zeros_like(x), np.linspace(spec["num_timesteps"] - 1, 0, steps).round().astype(int)
    levels = [*((spec["alphas"][t], spec["sigmas"][t]) for t in times), (1, 0)]

    for t, (alpha, sigma), (alpha_next, sigma_next) in zip(times, levels, levels[1:], strict=False):
        values = {"x_t": x, "t": np.full(num, t, np.int32), "cond_image": image, "x_start": x_start}
        x_start = predict(nets["denoiser"], spec, values | cond)
        if scale != 1 and first <= t <= last:
            x_start = scale * x_start + (1 - scale) * predict(nets["denoiser"], spec, values | uncond)
        x_start = np.clip(x_start, -1, 1) if spec["clip"] else x_start
        keep = sigma_next / sigma
        x = np.float32(alpha_next - keep * alpha) * x_start + np.float32(keep) * x

    if "decoder" in nets:
        (x,) = nets["decoder"].run(None, {"latent": x / np.float32(spec["latent_scale"])})
    return x * spec["scale"] + spec["center"] if "center" in spec else x


if __name__ == "__main__":
    x = sample(sys.argv[1], image=np.load(sys.argv[2]) if sys.argv[2:] else None)
    if x.ndim == 4:  # side by side
        row = np.clip(np.round((np.concatenate([*x], 2) + 1) * 127.5), 0, 255).astype(np.uint8)
        Image.fromarray(row.transpose(1, 2, 0).squeeze()).save("sample.png")
    else:
        np.savetxt("sample.csv", x, delimiter=",")
