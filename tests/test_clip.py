"""CLIP's text encoder, against its formulas in float64 and against transformers'."""

import math

import numpy as np
import pytest
from helpers import MODES

from mindspore import Tensor

from ms_diffusion.convert import load_into
from ms_diffusion.models.clip import ClipTextConfig
from ms_diffusion.runtime import UserError

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
}


def weights(config) -> dict[str, np.ndarray]:
    """Random weights, none of them what a new network has."""
    rng = np.random.default_rng(0)
    return {p.name: rng.normal(0, 0.4, p.shape).astype(np.float32) for p in config.build().get_parameters()}


def tokens(batch, length):
    return np.random.default_rng((batch, length)).integers(0, CONFIG["vocab_size"], (batch, length)).astype(np.int32)


def norm(x, w, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def by_formula(w, ids, heads, activation):
    """Radford et al. 2019, section 2.3 (pre-norm, causal), one text and one head after the other."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][: len(ids)]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        h = norm(x, w, f"{layer}.layer_norm1")
        q, k, v = [np.split(linear(h, f"{layer}.self_attn.{name}_proj"), heads, -1) for name in "qkv"]
        out = np.zeros_like(x)
        for position in range(len(ids)):
            parts = []
            for qh, kh, vh in zip(q, k, v, strict=True):
                scores = np.exp(kh[: position + 1] @ qh[position] / math.sqrt(qh.shape[1]))
                parts.append(scores / scores.sum() @ vh[: position + 1])
            out[position] = np.concatenate(parts)
        x = x + linear(out, f"{layer}.self_attn.out_proj")
        x = x + linear(activation(linear(norm(x, w, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return norm(x, w, "final_layer_norm")


ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize(("name", "mode"), [("gelu", "graph"), ("quick_gelu", "pynative")])
def test_by_formula(name, mode):
    config = ClipTextConfig(**CONFIG, hidden_act=name)
    net, w = config.build(), weights(config)
    load_into(net, w)
    encode = MODES[mode](net.construct)
    for batch, length in ((1, 9), (13, 4)):
        ids = tokens(batch, length)
        ours = encode(Tensor(ids)).asnumpy()
        expected = np.stack([by_formula(w, row, 3, ACTIVATIONS[name]) for row in ids])
        assert ours.shape == (batch, length, 12) and ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # to import transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_as_in_transformers(activation):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = ClipTextConfig(**CONFIG, hidden_act=activation)
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG, hidden_act=activation)).eval()
    w, net, ids = weights(config), config.build(), tokens(3, 9)
    state = peer.state_dict()
    start = "text_model." if any(name.startswith("text_model.") for name in state) else ""
    state |= {start + name: torch.from_numpy(value) for name, value in w.items()}
    peer.load_state_dict(state)
    load_into(net, w)
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(net(Tensor(ids)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="not divisible"):
        ClipTextConfig(hidden_size=10, num_attention_heads=3).build()
    with pytest.raises(UserError, match="hidden_act"):
        ClipTextConfig(hidden_act="relu").build()
