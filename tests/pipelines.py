"""A Stable Diffusion of a few thousand weights in a folder of diffusers, and its parts."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from make_golden import draw_weights

from ms_diffusion.data.tokenizers import BYTES, BytePairs
from ms_diffusion.models.autoencoder import AutoencoderConfig
from ms_diffusion.models.clip import ClipTextConfig
from ms_diffusion.models.unet_ldm import UNetModelConfig
from ms_diffusion.names import diffusers_names

TEXTS = [
    "low lower lowest",
    "new newer newest",
    "wide wider widest",
    "low new low new",
    "a red heart",
    "red heart, red flag",
]
CHINESE = ["红心", "红色的旗", "微笑的猫", "笑脸", "猫", "红心和猫 heart"]

PROMPTS = [
    "",
    "a photo of a cat",
    "It's  the DOG's 2nd day, isn't it?! they'll we've I'm he'd",
    "naïve Ünïcode \u00b2\u2167 x2y 3.14 don't; (brackets) _under_score_",
    "红心 heart ハート 心脏 한국어 हिन्दी ไทย",
    "<|endoftext|> <|startoftext|>after A<|endoftext|>b",
    "ΟΔΟΣ İstanbul \u0130 ß \x1c\x00\u200b\ufffd \u3000 e\u0301 \U0001f600\U0001f468\u200d\U0001f469",
    "a" * 200,
    "word " * 100,
]


def learned(texts) -> tuple[dict[str, int], list[str]]:
    """A vocabulary and merges in the form of CLIP's, from a trained tokenizer's."""
    pairs = [*BytePairs.train(texts, 600).ranks]
    letters = [*BYTES.values()]
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    merges = [(left, right + end) for left, right in pairs if "Ġ" not in left for end in ("", "</w>")]
    symbols += dict.fromkeys(left + right for left, right in merges)
    return {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip_folder(path, pad="<|endoftext|>", length=20):
    path.mkdir(parents=True)
    vocabulary, merges = learned([*TEXTS, *CHINESE, *PROMPTS])
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length, "pad_token": pad}))
    return path


# fmt: off
UNET = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1, "sample_size": 8,
    "in_channels": 4, "out_channels": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 12, "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
    "norm_num_groups": 4, "layers_per_block": 1, "scaling_factor": 0.5, "sample_size": 16,
}
TEXT = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 16, "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon", "timestep_spacing": "leading",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.2", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None], "feature_extractor": [None, None],
}
# fmt: on


def weights_of(config) -> dict[str, np.ndarray]:
    """Random weights by our names; of an encoder of images without any variance."""
    weights = draw_weights({p.name: p.shape for p in config.build().get_parameters()})
    if "quant_conv.weight" in weights:
        half = len(weights["quant_conv.weight"]) // 2
        weights["quant_conv.weight"][half:], weights["quant_conv.bias"][half:] = 0, -60
    return weights


def write_weights(folder, name, weights, dtype=np.float32, shards=1):
    """In one file, or in several with an index."""
    weights = {key: np.ascontiguousarray(value, dtype) for key, value in weights.items()}
    if shards == 1:
        return safetensors.numpy.save_file(weights, folder / f"{name}.safetensors")
    files = {key: f"{name}-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(sorted(weights))}
    for file in set(files.values()):
        safetensors.numpy.save_file({key: weights[key] for key in weights if files[key] == file}, folder / file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_pipeline(path: Path, unet=(), scheduler=(), text=(), index=(), vae=(), dtype=np.float32, shards=1) -> Path:
    """A folder as diffusers writes it, with other settings of the parts, and its weights in this type and so many files."""
    vocabulary = json.loads((clip_folder(path / "tokenizer", length=16) / "vocab.json").read_text())
    unet, vae, text = UNET | dict(unet), VAE | dict(vae), TEXT | {"vocab_size": len(vocabulary)} | dict(text)
    heads = unet["attention_head_dim"]
    network = UNetModelConfig(
        in_channels=unet["in_channels"],
        out_channels=4,
        model_channels=8,
        num_res_blocks=1,
        attention_resolutions=(1,),
        channel_mult=(1, 2),
        num_heads=heads if isinstance(heads, int) else heads[0],
        context_dim=12,
        groups=4,
        use_spatial_transformer=True,
    )
    first_stage = AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, resolution=2, groups=4)
    parts = {"unet": network, "vae": first_stage, "text_encoder": ClipTextConfig(**text)}
    for (part, config), settings in zip(parts.items(), (unet, vae, text), strict=True):
        weights = weights_of(config)
        names = {name: f"text_model.{name}" for name in weights} if part == "text_encoder" else diffusers_names(weights)
        weights = {names[name]: value for name, value in weights.items()}
        linear = (".to_", *([".proj_"] if unet.get("use_linear_projection") else []))
        weights = {name: a[..., 0, 0] if a.ndim == 4 and any(each in name for each in linear) else a
                   for name, a in weights.items()}  # fmt: skip
        file = ("model" if part == "text_encoder" else "diffusion_pytorch_model") + ".fp16" * (dtype == np.float16)
        (path / part).mkdir()
        (path / part / "config.json").write_text(json.dumps(settings))
        write_weights(path / part, file, weights, dtype, shards)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | dict(scheduler)))
    (path / "model_index.json").write_text(json.dumps(INDEX | dict(index)))
    return path
