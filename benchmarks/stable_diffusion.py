"""Memory and time per step of Stable Diffusion 1.5 at full size, with random weights in float16.

    python -m benchmarks.stable_diffusion make sd15      # a folder of 2.1 GB, in a process of its own
    python -m benchmarks.stable_diffusion run sd15 --size 512 --steps 3

`run` prints the peak of the process's memory when all is loaded, and at the end, and the seconds of each step: a step calls
the network twice, for the prompt and for the empty text.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"steps_offset": 1, "set_alpha_to_one": False}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CLASSES |= {"tokenizer": "CLIPTokenizer", "scheduler": "PNDMScheduler"}


def make(folder: Path) -> None:
    from mindspore.nn.utils import no_init_parameters

    from ms_diffusion.data.tokenizers import BYTES
    from ms_diffusion.models.clip import ClipTextConfig
    from ms_diffusion.names import diffusers_names
    from ms_diffusion.runtime import set_device
    from ms_diffusion.training.pipeline import read_unet, read_vae
    from ms_diffusion.training.text_encoder import Settings

    set_device("cpu")
    for part, settings in {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": SCHEDULER}.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(settings))
    index = {part: ["library", name] for part, name in CLASSES.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))

    letters = [letter + end for end in ("", "</w>") for letter in BYTES.values()]
    others = [f"unused{i}" for i in range(49406 - len(letters))]
    symbols = [*letters, *others, "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "tokenizer" / "merges.txt").write_text("")

    unet, vae = [Settings(folder / part / "config.json") for part in ("unet", "vae")]
    configs = {"text_encoder": ClipTextConfig(), "vae": read_vae(vae), "unet": read_unet(unet, 4, 64)}
    rng = np.random.default_rng(0)
    for part, config in configs.items():
        with no_init_parameters():
            net = config.build(None) if part == "unet" else config.build()
        shapes = {p.name.removeprefix("unet."): p.shape for p in net.get_parameters()}
        names = {name: name for name in shapes} if part == "text_encoder" else diffusers_names(shapes)
        weights = {}
        for name, shape in shapes.items():
            bound = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
            drawn = rng.random(shape, np.float32) * 2 * bound - bound
            weights[names[name]] = (drawn + (len(shape) == 1 and name.endswith("weight"))).astype(np.float16)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        safetensors.numpy.save_file(weights, folder / part / f"{stem}.fp16.safetensors")
        print(f"{part}: {sum(a.size for a in weights.values()):,} parameters")


def run(folder: Path, size: int, steps: int) -> None:
    import ms_diffusion as md

    clock = time.perf_counter()

    def peak() -> str:
        return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"

    pipeline = md.load(folder, device="cpu", size=(size,))
    print(f"loaded in {time.perf_counter() - clock:.1f} s, {peak()}")
    clock, seconds = time.perf_counter(), []

    def watch(*_) -> None:
        nonlocal clock
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()

    pipeline.sample(prompt="a photo of a cat", steps=steps, callback=watch)
    print(f"steps (the first compiles): {', '.join(f'{each:.1f}' for each in seconds)} s")
    print(f"decoded in {time.perf_counter() - clock:.1f} s, {peak()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
    else:
        run(args.folder, args.size, args.steps)
