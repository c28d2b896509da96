"""A frozen text encoder of CLIP in a folder of diffusers, whose outputs a network is conditioned on."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.numpy

from mindspore import Tensor

from ..convert import load_into
from ..data.tokenizers import BytePairs, Tokenizer
from ..fields import Bounds, as_value, find_problem
from ..files import cache_folder, check_memory, in_batches, load_or_compute, read_json, write, write_json
from ..models.clip import ClipTextConfig, ClipTextEncoder
from ..runtime import UserError, alone, compiled
from ..weight_files import flat, read_weights
from .tasks.labels import Captions

WHOLE = Annotated[int, Bounds(1, 2**20)]
BATCH = 16  # texts that are encoded at once
FOLDER = "text_encoder"  # of the encoder, in a folder of diffusers and in that of a run
TOKENIZER = "tokenizer.json"  # in a run's folder of the encoder


class Settings:
    """The JSON file of a part, in which every value is checked as it is read: its errors name the file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values = read_json(path)
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}): copy the whole folder") from e
        except ValueError as e:
            raise UserError(f"{path} is no JSON file: copy or download it again") from e
        if problem := find_problem(self.values, dict[str, Any]):
            raise UserError(f"{path}: {problem}")

    def get(self, name: str, hint: Any, default: Any) -> Any:
        """The value of this type; lists become tuples."""
        value = as_value(self.values.get(name, default))
        problem = find_problem(value, hint) or ("it must not be empty" if value == () else None)
        if problem:
            raise UserError(f"{self.path}: {name} is {value!r:.200}: {problem}")
        return value

    def only(self, settings: dict[str, Any]) -> None:
        """Refuse what is no part of Stable Diffusion 1 or 2."""
        for name, value in settings.items():
            if self.values.get(name, value) not in (value, [value] * 4):
                is_now = f"{name} is {self.values[name]!r:.200}"
                raise UserError(f"{self.path}: {is_now}, where Stable Diffusion 1 and 2 have {value!r}: it cannot be read")


class Contexts(Captions):
    """A caption of an image, as the entries (L, dim) that a frozen encoder makes of its tokens; `null` is that of the empty
    text. Until `describe` gives it captions there are only those of the user."""

    field = "context"

    def __init__(self, encoder: ClipTextEncoder, config: ClipTextConfig, tokenizer: Tokenizer):
        self.encoder, self.config, self.tokenizer = encoder, config, tokenizer
        self.graph, self.known, self.is_described = compiled(encoder.construct), {}, False
        super().__init__([[""]], tokenizer, null=self.encode([""])[0])
        self.count = None

    def describe(self, table: Sequence[Sequence[str]], names: Sequence[str] | None) -> "Contexts":
        """Itself, with the captions and names of `Captions`."""
        super().__init__(table, self.tokenizer, names, self.null)
        self.is_described = True
        return self

    def content(self) -> bytes:
        """The encoder's weights as a file; those that float16 holds exactly are written so."""
        weights = {p.name: p.asnumpy() for p in self.encoder.get_parameters()}
        with np.errstate(over="ignore"):
            halves = {name: values.astype(np.float16) for name, values in weights.items()}
        is_exact = all((halves[name] == weights[name]).all() for name in weights)
        return safetensors.numpy.save(halves if is_exact else weights)

    @cached_property
    def sha256(self) -> str:
        """Of the encoder's weights and its tokenizer."""
        return hashlib.sha256(self.content() + json.dumps(self.tokenizer.to_record()).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            with alone():  # what is known to one rank may be new to another
                self.known |= zip(new, self.compute(new), strict=True)
        check_memory(len(texts) * next(iter(self.known.values())).nbytes, f"the context of {len(texts)} texts")
        return np.stack([self.known[text] for text in texts])

    def compute(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (N, L, dim) float32, by the network. All ranks call this, or one of them `alone`."""
        most, lengths = self.tokenizer.max_length, [self.tokenizer.length(text) for text in texts]
        if long := [length for length in lengths if length > most]:
            which = f"a text has {long[0]} tokens" if len(long) == 1 else f"{len(long)} texts have up to {max(long)} tokens"
            print(f"note: {which}, and only the first {most} count", file=sys.stderr)
        tokens, name = self.tokenizer.encode(texts), "captions" if len(texts) > BATCH else None
        return in_batches(lambda batch: [self.graph(Tensor(batch)).asnumpy()], tokens, BATCH, name)[0]

    def encode_table(self, texts: Sequence[str]) -> np.ndarray:
        """From the user's cache, or computed by all ranks together."""
        shape = (len(texts), *self.null.shape)
        check_memory(2 * 4 * int(np.prod(shape)), f"the context of {len(texts)} captions")
        key = hashlib.sha256(json.dumps([self.sha256, *texts]).encode()).hexdigest()
        path = cache_folder() / f"captions-{key[:16]}.bin"
        return load_or_compute(path, key, {"rows": shape}, lambda: {"rows": self.compute(texts)})["rows"]

    def rows(self, num: int, labels: Any = None, prompt: str | None = None) -> np.ndarray:
        if isinstance(labels, np.ndarray) and labels.ndim == 3:
            return labels
        if not self.is_described:
            if labels is not None:
                raise UserError("Stable Diffusion has no classes, which --class needs: describe the picture by --prompt")
            prompt = prompt or ""
        return super().rows(num, labels, prompt)

    def null_rows(self, num: int) -> np.ndarray:
        return self.null[None].repeat(num, 0)

    def label_array(self, labels: Any, num: int) -> Any:
        return super().label_array(labels, num) if self.is_described else None

    def titles(self, ids: Any) -> list[str] | None:
        return super().titles(ids) if self.is_described else None

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in super().record().items() if name != "tokenizer"}  # beside the encoder


def load_text_encoder(folder: Path, context_dim: int) -> Contexts:
    """The text encoder and the tokenizer of a folder of diffusers, or of a run. Raises UserError if one cannot be read, or
    the encoder's width is not `context_dim`."""
    path = folder / FOLDER
    settings = Settings(path / "config.json")
    settings.only({"layer_norm_eps": 1e-5, "use_attention_mask": False})
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
    defaults = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}  # those of transformers
    options = {name: settings.get(name, WHOLE, defaults.get(name, getattr(ClipTextConfig, name))) for name in names}
    activation = settings.get("hidden_act", str, "quick_gelu")
    tokenizer = kept_tokenizer(path / TOKENIZER) if (path / TOKENIZER).exists() else BytePairs.read(folder / "tokenizer")
    try:
        config = ClipTextConfig(**options, hidden_act=activation)
        encoder = config.build()
    except (UserError, ValueError) as e:
        raise UserError(f"{settings.path}: {e}") from e
    if config.hidden_size != context_dim:
        raise UserError(f"{settings.path}: hidden_size is {config.hidden_size}, where the network takes {context_dim}")
    if tokenizer.vocab_size > config.vocab_size or tokenizer.max_length > config.max_position_embeddings:
        raise UserError(f"{folder / 'tokenizer'} has more tokens than {settings.path} says: copy the whole folder")
    weights = {name.removeprefix("text_model."): a for name, a in flat(read_weights(path))}
    others = ("embeddings.position_ids", "text_projection.weight")
    load_into(encoder, {name: a for name, a in weights.items() if name not in others}, path=path)
    contexts = Contexts(encoder.set_train(False), config, tokenizer)
    known = settings.get("sha256", str | None, None)  # of a run's copy
    if known and known != contexts.sha256:
        raise UserError(f"{path} is damaged: copy it from where the run was made")
    return contexts


def kept_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_record(read_json(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it from where the run was made") from e


def keep_text_encoder(run: Path, contexts: Contexts) -> None:
    """Write the text encoder and its tokenizer to a run's folder, unless they are there."""
    weights, tokenizer, config = [run / FOLDER / name for name in ("model.safetensors", TOKENIZER, "config.json")]
    record = asdict(contexts.config) | {"sha256": contexts.sha256}  # is written last: now it is complete
    if not (weights.exists() and tokenizer.exists() and config.exists() and read_json(config) == record):
        write(weights, lambda file: file.write(contexts.content()))
        write_json(tokenizer, contexts.tokenizer.to_record())
        write_json(config, record)
