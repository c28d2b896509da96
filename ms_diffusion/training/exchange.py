"""A run's networks for other programs: as state dicts of CompVis latent-diffusion, and as folders of diffusers."""

from typing import Any

import numpy as np

from mindspore import nn

from ..models.autoencoder import AutoencoderConfig, VQConfig
from ..models.unet_ldm import UNetModelConfig
from ..names import PREDICTION_TYPES, diffusers_names, home, split_qkv
from ..process import GaussianDiffusion, Process
from ..runtime import UserError
from .checkpoint import read_config
from .runs import Run, open_run

Arrays = dict[str, np.ndarray]


def arrays_of(net: nn.Cell) -> Arrays:
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def networks(run: Run) -> dict[str, nn.Cell]:
    """The networks of a run: its denoiser, and the first stage of latents, or its autoencoder."""
    if run.diffusion is None:
        return {"autoencoder": run.net}
    first_stage = getattr(run.task, "first_stage", None)
    return {"denoiser": run.net} | ({"autoencoder": first_stage.net} if first_stage else {})


def check_kind(run: Run) -> None:
    """Raise UserError if the networks of a run are none that CompVis and diffusers know."""
    if "autoencoder" not in networks(run):
        kinds = "runs of latents and of autoencoders can be written so"
        raise UserError(f"{run.name} is a run of {run.config.kind}, and {kinds}: use --format safetensors, or onnx")


def compvis_state_dict(run: Run) -> Arrays:
    """The state dict of CompVis' AutoencoderKL, or of a LatentDiffusion: its U-Net, condition's encoder, first stage,
    schedule and latent scale. Its moving averages are the same weights: CompVis' scripts sample from those.

    Raises UserError if the networks of the run are none of CompVis'."""
    check_kind(run)
    if (diffusion := run.diffusion) is None:
        return arrays_of(run.net)
    weights = arrays_of(run.net) | arrays_of(run.task.first_stage.net)
    weights = {"".join(home(name)): a for name, a in weights.items()}
    unet = {name.removeprefix("model."): a for name, a in weights.items() if name.startswith("model.diffusion_model.")}
    averages = {f"model_ema.{name.replace('.', '')}": a for name, a in unet.items()}
    counters = {"decay": np.float32(run.config.train.ema_decay), "num_updates": np.int32(run.step)}
    weights |= averages | {f"model_ema.{name}": np.array(value) for name, value in counters.items()}
    return weights | schedule(diffusion) | {"scale_factor": np.array(run.task.first_stage.scale, np.float32)}


def check_betas(diffusion: Process | None) -> None:
    if diffusion is not None and not isinstance(diffusion, GaussianDiffusion):
        raise UserError("the process of this run has no betas, which this format needs: choose safetensors, onnx or mindir")


def schedule(diffusion: GaussianDiffusion) -> Arrays:
    """The buffers of CompVis' DDPM, (T,) float32. Raises UserError if the process has no betas."""
    check_betas(diffusion)
    alphas_cumprod, variance = diffusion.alphas_cumprod, diffusion.posterior_variance
    with np.errstate(divide="ignore"):  # of a schedule that ends at alpha_bar 0
        tables = {
            "betas": diffusion.betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": diffusion.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": diffusion.posterior_mean_coef1,
            "posterior_mean_coef2": diffusion.posterior_mean_coef2,
        }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def updates(run: Run) -> Arrays:
    """The low-rank updates of a run as PEFT names them, with lora_alpha the rank: A and B of each layer, whose W is that of
    the run that it started from. A denoiser that attends to a context has diffusers' names.

    Raises UserError if the run has no updates."""
    if not getattr(run.config.train, "lora_rank", 0):
        raise UserError(f"{run.name} was trained without low-rank updates (--train.lora-rank): choose another --format")
    arrays, names = open_run(run.name, ["lora"])[1].arrays["lora"], {}
    if getattr(run.config.model, "context_dim", None):
        inside = [name.removeprefix("unet.") for name in arrays_of(run.net) if name.startswith("unet.")]
        names = {f"unet.{ours}": f"unet.{theirs}" for ours, theirs in diffusers_names(inside).items()}
    renamed = {}
    for name, a in arrays.items():
        path, _, end = name.partition(".lora_")
        renamed[f"{names.get(f'{path}.weight', f'{path}.weight').removesuffix('.weight')}.lora_{end}"] = a
    return renamed


# diffusers


def diffusers_models(run: Run) -> dict[str, tuple[dict[str, Any], Arrays]]:
    """The config.json and the weights of each model of diffusers that a run gives, by its folder: "" for an autoencoder, and
    unet, vae (vqvae in a whole pipeline) and scheduler, which has no weights, for latents.

    Raises UserError if a network has an option that diffusers lacks."""
    check_kind(run)
    check_betas(run.diffusion)
    if run.diffusion is None:
        return {"": autoencoder_of_diffusers(run.config.model, run.net, 1.0)}
    first_stage, model = run.task.first_stage, run.config.model
    stage_config: Any = read_config(run.home / "first_stage")
    unet = {name.removeprefix("unet."): a for name, a in arrays_of(run.net).items() if name.startswith("unet.")}
    stage = {name: a for name, a in arrays_of(run.net).items() if name.startswith("cond_stage.")}
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": run.diffusion.num_timesteps,
        "trained_betas": run.diffusion.betas.tolist(),
        "prediction_type": PREDICTION_TYPES[run.diffusion.objective],
        "clip_sample": bool(run.diffusion.clip_denoised),
        "timestep_spacing": "trailing",
    }
    blocks = {name: (cell.heads, cell.new_order) for name, cell in run.net.unet.cells_and_names() if hasattr(cell, "qkv")}
    models = {"unet": unet_of_diffusers(model, unet, blocks), "scheduler": (scheduler, {})}
    is_pipeline = model.condition == "none" and not model.cond_channels
    vae = "vqvae" if is_pipeline else "vae"
    models[vae] = autoencoder_of_diffusers(stage_config.model, first_stage.net, first_stage.scale)
    if stage:
        models["cond_stage"] = {}, stage
    if is_pipeline:
        index = {name: ["diffusers", record["_class_name"]] for name, (record, _) in models.items()}
        models[""] = {"_class_name": "LDMPipeline", **index}, {}
    return models


def refuse(options: dict[str, bool]) -> None:
    """Raise UserError if one of the options is on, by its flag."""
    if wrong := [name for name, is_on in options.items() if is_on]:
        raise UserError(f"diffusers has no network with {wrong[0]}: use --format compvis or safetensors")


def named_for_diffusers(arrays: Arrays, blocks: dict[str, tuple[int, bool]]) -> Arrays:
    """Arrays of CompVis' names under diffusers' names and in its shapes: the projections of its attention are linear layers.
    `blocks` are the number of heads, and whether the order is the new one, of the AttentionBlocks by their paths."""
    names = diffusers_names(arrays)
    renamed = {names[name]: a for name, a in arrays.items()}
    qkv = {names[f"{path}.qkv.{end}"]: block for path, block in blocks.items() for end in ("weight", "bias")}
    renamed = split_qkv(renamed, qkv)
    linear = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    return {name: a.reshape(a.shape[:2]) if name.endswith(linear) else a for name, a in renamed.items()}


def unet_of_diffusers(config: UNetModelConfig, arrays: Arrays, blocks: dict[str, tuple[int, bool]]) -> tuple[Any, Arrays]:
    """A UNet2DConditionModel, or a UNet2DModel where there is no context."""
    takes_context, updown = config.context_dim is not None, config.resblock_updown
    widths = [mult * config.model_channels for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    at_work = [*attends[:-1], True]  # the middle has the heads of the last level
    heads = [config.heads(width) if at else (1, width) for width, at in zip(widths, at_work, strict=True)]
    sizes = {width for (_, width), at in zip(heads, at_work, strict=True) if at}
    refuse({
        "--model.dims 1": config.dims == 1,
        "--model.channel-mult that does not begin with 1": widths[0] != config.model_channels,
        "--model.no-conv-resample": not (config.conv_resample or updown),
        "--model.n-embed": bool(config.n_embed),
        "--model.num-heads-upsample": any(config.heads(width, up=True) != each
                                          for width, each, at in zip(widths, heads, attends, strict=True) if at),
        "--model.resblock-updown and a context": updown and takes_context,
        "heads of several sizes and no context": len(sizes) > 1 and not takes_context,
        "heads that are not as wide as the layer": any(a * b != c for (a, b), c in zip(heads, widths, strict=True)),
    })  # fmt: skip
    kind = "CrossAttn" if takes_context else "Attn"
    down = [f"{kind}DownBlock2D" if at else "ResnetDownsampleBlock2D" if updown else "DownBlock2D" for at in attends]
    up = [f"{kind}UpBlock2D" if at else "ResnetUpsampleBlock2D" if updown else "UpBlock2D" for at in reversed(attends)]
    record = {
        "_class_name": "UNet2DConditionModel" if takes_context else "UNet2DModel",
        "sample_size": getattr(config, "latent_size", None),
        "in_channels": arrays["input_blocks.0.0.weight"].shape[1],
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "flip_sin_to_cos": not config.sines_first,
        "freq_shift": int(config.sines_first),
        "downsample_padding": int(not config.pad_right),
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "num_class_embeds": len(arrays["label_emb.weight"]) if "label_emb.weight" in arrays else None,
    }
    if takes_context:  # its attention_head_dim is the number of heads
        own = {"transformer_layers_per_block": config.transformer_depth, "cross_attention_dim": config.context_dim}
        record |= {"attention_head_dim": [count for count, _ in heads], **own}
    else:
        record |= {"attention_head_dim": sizes.pop(), "attn_norm_num_groups": config.groups}
        record |= dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if updown else "conv")
    return record, named_for_diffusers(arrays, blocks)


def autoencoder_of_diffusers(config: AutoencoderConfig, net: nn.Cell, scale: float) -> tuple[Any, Arrays]:
    """An AutoencoderKL, or a VQModel."""
    quantizes = isinstance(config, VQConfig)
    refuse({
        "--model.attention linear": config.attention == "linear",
        "--model.no-resamp-with-conv": not config.resamp_with_conv,
        "--model.tanh-out": config.tanh_out,
        "--model.z-channels other than --model.embed-dim": config.z_channels != config.embed_dim and not quantizes,
        "a codebook and --model.attention none": quantizes and config.attention == "none",
        "--model.remap": quantizes and config.remap is not None,
        "--model.ch-mult that does not begin with 1": config.ch_mult[0] != 1,
    })  # fmt: skip
    attends = [
        config.resolution // 2**level in config.attn_resolutions and config.attention == "vanilla"
        for level in range(len(config.ch_mult))
    ]
    record = {
        "_class_name": "VQModel" if quantizes else "AutoencoderKL",
        "sample_size": config.resolution,
        "in_channels": config.channels,
        "out_channels": config.out_channels or config.channels,
        "latent_channels": config.z_channels,
        "block_out_channels": [mult * config.ch for mult in config.ch_mult],
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["AttnDownEncoderBlock2D" if at else "DownEncoderBlock2D" for at in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if at else "UpDecoderBlock2D" for at in reversed(attends)],
        "norm_num_groups": config.groups,
        "scaling_factor": scale,
    }
    own = {"num_vq_embeddings": config.n_embed, "vq_embed_dim": config.embed_dim} if isinstance(config, VQConfig) else {}
    record |= own or {"mid_block_add_attention": config.attention == "vanilla"}
    return record, named_for_diffusers(arrays_of(net), {})
