"""Names of weights in CompVis latent-diffusion and in diffusers, for the parameters of our networks."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FIRST_STAGE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")  # prefixes of its names
RESBLOCK = ("in_layers", "emb_layers", "out_layers", "skip_connection")

# Parts of CompVis's names -> diffusers' names for them
# fmt: off
UNET_PIECES = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}
AUTOENCODER_PIECES = {
    "mid.block_1": "mid_block.resnets.0", "mid.attn_1": "mid_block.attentions.0", "mid.block_2": "mid_block.resnets.1",
    "down": "down_blocks", "block": "resnets", "attn": "attentions", "downsample": "downsamplers.0",
    "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "norm": "group_norm",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}
# fmt: on
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # objectives, as diffusers calls them
OLDER_PIECES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in old files


def with_pieces(name: str, pieces: Mapping[str, str]) -> str:
    dotted = f".{name}"
    for piece, other in pieces.items():
        dotted = dotted.replace(f".{piece}.", f".{other}.")
    return dotted[1:]


def diffusers_name(name: str, per_level: int, levels: int, attention_blocks: frozenset[str] = frozenset()) -> str:
    """diffusers' name of a parameter of a UNetModel with `per_level` blocks per level and AttentionBlocks at these paths, or
    of a first stage with `levels` levels. The `qkv` of an AttentionBlock stands for `to_q`, `to_k` and `to_v`."""
    in_attention_block = name.startswith(tuple(f"{block}." for block in attention_blocks))
    match name.split("."):
        case ["input_blocks", block, "0", *rest] if block != "0" and int(block) % per_level == 0:
            place = f"down_blocks.{(int(block) - 1) // per_level}.downsamplers.0"
            name = f"{place}.conv.{rest[-1]}" if rest[0] == "op" else ".".join((place, *rest))
        case ["output_blocks", block, layer, *rest] if rest[0] == "conv" or (layer != "0" and rest[0] in RESBLOCK):
            name = ".".join((f"up_blocks.{int(block) // per_level}.upsamplers.0", *rest))
        case ["input_blocks", block, layer, *rest] if block != "0":
            level, i = divmod(int(block) - 1, per_level)
            name = ".".join((f"down_blocks.{level}.{'resnets' if layer == '0' else 'attentions'}.{i}", *rest))
        case ["output_blocks", block, layer, *rest]:
            level, i = divmod(int(block), per_level)
            name = ".".join((f"up_blocks.{level}.{'resnets' if layer == '0' else 'attentions'}.{i}", *rest))
        case ["decoder", "up", level, *rest]:  # from large to small images; diffusers has the reverse order
            name = ".".join((f"decoder.up_blocks.{levels - 1 - int(level)}", *rest))
    name = with_pieces(name, AUTOENCODER_PIECES if name.startswith(FIRST_STAGE) else UNET_PIECES)
    return with_pieces(name, {"norm": "group_norm", "proj_out": "to_out.0"}) if in_attention_block else name


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """CompVis's name of each parameter of a UNetModel or a first stage -> diffusers' name."""
    names = list(names)
    paths = [name.split(".") for name in names]
    # A level's blocks end with the one that has no ResBlock, or with the one in which the ResBlock is not the first layer
    gap = next(i for i in itertools.count(1) if f"input_blocks.{i}.0.in_layers.0.weight" not in names)
    ends = [int(block) + 1 for place, block, layer, *rest in (p for p in paths if len(p) > 3)
            if place == "output_blocks" and (rest[0] == "conv" or (layer != "0" and rest[0] in RESBLOCK))]  # fmt: skip
    levels = len({path[2] for path in paths if path[:2] == ["decoder", "up"]})
    attention_blocks = frozenset(name.removesuffix(".qkv.weight") for name in names if name.endswith(".qkv.weight"))
    return {name: diffusers_name(name, min([gap, *ends]), levels, attention_blocks) for name in names}


def home(name: str) -> tuple[str, str]:
    """Prefix and name of our parameter in CompVis's LatentDiffusion."""
    if name.startswith("cond_stage."):
        return "cond_stage_model.", name.removeprefix("cond_stage.")
    if name.startswith(FIRST_STAGE):
        return "first_stage_model.", name
    return "model.diffusion_model.", name.removeprefix("unet.")


def names_in_files(names: Iterable[str]) -> dict[str, str]:
    """Our name of a parameter by each name that a file may have for it."""
    homes = {name: home(name) for name in names}
    theirs = diffusers_names(name for _, name in homes.values())
    known = {}
    for ours, (place, name) in homes.items():
        spellings = ours, name, place + name, theirs[name], with_pieces(theirs[name], OLDER_PIECES)
        known |= dict.fromkeys(spellings, ours)
    return known


def plain(name: str) -> str:
    """The name without what torch.compile and DataParallel put into it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def prefix_of(names: Iterable[str], known: Mapping[str, str]) -> str:
    """What precedes a network's `known` names in a file, such as "model." or "ema.ema_model.": the prefix with which most of
    its parameters are found; of several, one of moving averages, else the shortest. "" if fewer than half are found."""
    found: dict[str, set[str]] = {"": set()}
    for name in names:
        parts = name.split(".", 8)  # a wrapper in a wrapper has fewer
        for i in range(len(parts)):
            if (ours := known.get(".".join(parts[i:]))) is not None:
                found.setdefault("".join(f"{part}." for part in parts[:i]), set()).add(ours)
    most = max(map(len, found.values()))
    if 2 * most < len(set(known.values())):
        return ""
    return min((p for p in found if len(found[p]) == most), key=lambda prefix: (not is_average(prefix), len(prefix)))


def is_average(prefix: str) -> bool:
    """Whether the names that begin with this prefix are those of moving averages."""
    return re.search(r"(^|[._])ema([._]|$)", prefix) is not None


def unlike(config: Any, record: Mapping[str, Any]) -> list[str]:
    """What a UNetModel of this configuration has otherwise than a UNet of diffusers with this config.json, of what the
    shapes of weights do not tell: such weights would load, and the network would draw noise."""
    ours = {"norm_eps": config.norm_eps, "norm_num_groups": config.groups, "act_fn": "silu", "center_input_sample": False}
    ours |= {"flip_sin_to_cos": not config.sines_first, "freq_shift": int(config.sines_first)}
    ours |= {"downsample_padding": int(not config.pad_right)} if config.conv_resample and not config.resblock_updown else {}
    found = [
        f"{name} {record[name]!r:.100}, not {value}" for name, value in ours.items() if record.get(name, value) != value
    ]
    name = "attention_head_dim" if record.get("num_attention_heads") is None else "num_attention_heads"
    given, levels = record.get(name, ""), len(config.channel_mult)
    each = given if isinstance(given, list) else [given] * levels
    for level, (mult, value) in enumerate(zip(config.channel_mult, each, strict=False)):
        width = mult * config.model_channels
        if not (2**level in config.attention_resolutions or level == levels - 1) or not isinstance(value, int | None):
            continue  # no attention there, or the file does not say
        is_count = record["_class_name"] == "UNet2DConditionModel"  # of heads; otherwise their width
        theirs = value if is_count else width // (value or width)
        if theirs != (heads := config.heads(width)[0]):
            return [*found, f"{name} {given!r:.100}, which are {theirs} heads of {width} channels, not {heads}"]
    return found


def joined_qkv(arrays: Mapping[str, np.ndarray], qkv: Mapping[str, tuple[int, bool]]) -> dict[str, np.ndarray]:
    """`arrays` with one array for the `to_q`, `to_k` and `to_v` of each AttentionBlock.

    Args:
        qkv: name of the joined array, such as "mid_block.attentions.0.qkv.weight" -> the block's number of heads, and
            whether its channels are in the new order.
    """
    joined = dict(arrays)
    for name, (heads, new_order) in qkv.items():
        for parts in (("to_q", "to_k", "to_v"), ("query", "key", "value")):
            names = [name.replace(".qkv.", f".{part}.") for part in parts]
            if all(each in joined for each in names):
                each_head = [(a := joined.pop(n)).reshape(1 if new_order else heads, -1, *a.shape[1:]) for n in names]
                if len({a.shape for a in each_head}) == 1:
                    whole = np.concatenate(each_head, 1)
                    joined[name] = whole.reshape(-1, *whole.shape[2:])
    return joined


def split_qkv(arrays: Mapping[str, np.ndarray], qkv: Mapping[str, tuple[int, bool]]) -> dict[str, np.ndarray]:
    """The inverse of `joined_qkv`."""
    split = dict(arrays)
    for name, (heads, new_order) in qkv.items():
        a = split.pop(name)
        each_head = a.reshape(1 if new_order else heads, 3, -1, *a.shape[1:])
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            split[name.replace(".qkv.", f".{part}.")] = np.ascontiguousarray(each_head[:, i]).reshape(-1, *a.shape[1:])
    return split
