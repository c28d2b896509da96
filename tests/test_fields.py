"""The validator of configurations: types, ranges and names by the flag, and dataclasses from JSON objects."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest

from ms_diffusion.fields import AT_LEAST_1, FRACTION, NON_NEGATIVE, POSITIVE, Bounds, OneOf, check_fields, from_record
from ms_diffusion.runtime import UserError

REGISTRY = {"adam": 1, "sgd": 2}


@dataclass(frozen=True)
class Inner:
    lr: Annotated[float, POSITIVE] = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    lengths: tuple[Annotated[float, FRACTION], ...] = ()
    warmup_steps: Annotated[int, NON_NEGATIVE] = 0


@dataclass(frozen=True)
class Other:
    width: int = 3


@dataclass(frozen=True)
class Config:
    size: Annotated[int, AT_LEAST_1] = 28
    dropout: Annotated[float, Bounds(0, 1, high_open=True)] = 0.0
    classes: Annotated[int, AT_LEAST_1] | None = None
    optimizer: Annotated[str, OneOf(REGISTRY)] = "adam"
    precision: Literal["fp32", "fp16"] = "fp32"
    name: str | None = None
    flip: bool = False
    train: Inner | Other = field(default_factory=Inner)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(size=1, dropout=0.999, classes=10, optimizer="sgd", precision="fp16", name="x", flip=True),
        Config(size=np.int64(3), dropout=np.float32(0.5)),
        Config(dropout=0, train=Inner(lr=1, betas=(0, 1), lengths=(0.0, 1.0, 0.5))),
        Config(train=Other(-5)),
    ],
)
def test_values_that_fit(config):
    check_fields(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(size=0), "--size is 0: it must be at least 1"),
        (Config(size=2.0), "--size is 2.0: it must be a whole number"),
        (Config(size=True), "--size is True: it must be a whole number"),
        (Config(size=None), "--size is None: it must be a whole number"),
        (Config(dropout=1.0), r"--dropout is 1.0: it must be in \[0, 1\)"),
        (Config(dropout=-0.1), r"--dropout is -0.1: it must be in \[0, 1\)"),
        (Config(dropout="0.1"), "--dropout is '0.1': it must be a finite number"),
        (Config(classes=0), "--classes is 0: it must be at least 1"),
        (Config(optimizer="lion"), "--optimizer is 'lion': choose one of adam, sgd"),
        (Config(precision="bf16"), "--precision is 'bf16': choose one of fp32, fp16"),
        (Config(name=3), "--name is 3: it must be text"),
        (Config(flip=1), "--flip is 1: it must be True or False"),
        (Config(train=Inner(lr=0)), "--train.lr is 0: it must be above 0"),
        (Config(train=Inner(lr=float("nan"))), "--train.lr is nan: it must be a finite number"),
        (Config(train=Inner(lr=float("inf"))), "--train.lr is inf: it must be a finite number"),
        (Config(train=Inner(warmup_steps=-1)), "--train.warmup-steps is -1: it must be at least 0"),
        (Config(train=Inner(betas=(0.9,))), "--train.betas is .*: give 2 values"),
        (Config(train=Inner(betas=0.9)), "--train.betas is 0.9: give several values"),
        (Config(train=Inner(betas=(0.9, "x"))), "--train.betas is .*: it must be a finite number"),
        (Config(train=Inner(lengths=(0.5, 1.5))), r"--train.lengths is .*: it must be in \[0, 1\]"),
    ],
)
def test_values_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        check_fields(config)


def test_names_are_those_of_the_registry_now(monkeypatch):
    monkeypatch.setitem(REGISTRY, "lion", 3)
    check_fields(Config(optimizer="lion"))


def test_without_flags_the_fields_are_named_as_in_python():
    with pytest.raises(UserError, match="^train.warmup_steps is -1"):
        check_fields(Config(train=Inner(warmup_steps=-1)), prefix="")


# From JSON


@pytest.mark.parametrize("config", [Config(), Config(size=5, train=Inner(lengths=(0.1, 0.2))), Config(train=Other(7))])
def test_records_come_back(config):
    record = asdict(config)
    record["train"] = {key: list(value) if isinstance(value, tuple) else value for key, value in record["train"].items()}
    assert from_record(Config, record) == config


def test_absent_fields_have_their_defaults():
    assert from_record(Config, {"size": 7}) == Config(size=7)
    assert from_record(Config, {"train": {"width": 4}}).train == Other(4)


def test_obsolete_fields():
    old = {"size": 9, "train": {"betas": [0.5, 0.6], "lr": 0.1}, "gone": None}
    assert from_record(Config, old, {"gone"}) == Config(size=9, train=Inner(lr=0.1, betas=(0.5, 0.6)))
    with pytest.raises(ValueError, match="^unknown field gone$"):
        from_record(Config, old)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sizes": 3}, "unknown field sizes"),
        ({"train": {"rate": 3}}, r"unknown field train\.rate"),
        ({"train": 3}, r"train\. is not an object"),
        ([], "it is not an object"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_record(Config, record)
