"""Configurations: presets, refused values, overrides, flags over a preset, and config.json of now and of before."""

import json
import resource
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ms_diffusion.commands.train import parse_args
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import MIGRATIONS, RENAMED, Config, config_from_record, override
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.tasks.points import POINTS_FILE, TOYS

OLD = json.loads(Path(__file__).with_name("old_configs.json").read_text())
PIXELS, POINTS, AUTOENCODER, LATENT = (PRESETS[name] for name in ("quick", "scurve", "autoencoder", "latent"))
HUGE = {"autoencoder-kl-f8"}  # 84 million weights: built with fewer channels


def merge(record, changes):
    return record | {key: merge(record[key], value) if isinstance(value, dict) else value for key, value in changes.items()}


def old_record(name):
    """The config.json that this preset had before there were kinds: fields of all of them, some with other names."""
    changes = dict(OLD[name])
    return merge(OLD[like], changes) if (like := changes.pop("like", None)) else changes


# Presets


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore:alpha_bar_T is 0.(132|778)")  # of fashion-mnist-seed and scurve-exact: their recipes
def test_every_preset_checks_and_builds(name):
    config = PRESETS[name]
    config.check()
    if name in HUGE:
        config = override(config, ch=32)
    net, diffusion = config.task().build()
    assert sum(p.size for p in net.trainable_params()) > 1000
    assert diffusion is None or diffusion.num_timesteps == config.diffusion.num_timesteps
    if diffusion:
        assert config.task().cond_fields == config.model.cond_fields
        assert diffusion.clip_denoised == (config.kind != "latents")


def test_what_the_presets_are():
    assert {name: PRESETS[name].data.name for name in TOYS} == {name: name for name in TOYS}
    assert type(PRESETS["scurve-seed"].model) is MLPConfig and type(PRESETS["scurve"].model) is ResidualMLPConfig
    seed = PRESETS["fashion-mnist-seed"]
    assert seed.train.ema_decay == 0 and not seed.train.lr_decay
    with pytest.warns(UserWarning, match="alpha_bar_T is 0.132"):  # much of the data is left in x_T
        betas = seed.diffusion.build().betas
    np.testing.assert_allclose(betas, np.linspace(1e-4, 0.02, 200), rtol=1e-6)
    autoencoder, latent = AUTOENCODER.model, LATENT.model
    assert (autoencoder.embed_dim, autoencoder.channels) == (latent.in_channels, latent.channels)
    assert latent.latent_size * autoencoder.size_multiple == LATENT.data.size == AUTOENCODER.data.size
    assert not LATENT.data.flip and not AUTOENCODER.data.flip and not PRESETS["fashion-mnist-class"].data.flip


# Values that are refused: the message names the flag, and the value


@pytest.mark.parametrize(
    ("config", "values", "flag", "shown"),
    [
        # one of each kind of range
        (PIXELS, {"lr": 0.0}, "--train.lr", "0.0"),
        (PIXELS, {"lr": float("nan")}, "--train.lr", "nan"),
        (PIXELS, {"warmup_steps": -1}, "--train.warmup-steps", "-1"),
        (PIXELS, {"batch_size": 0}, "--train.batch-size", "0"),
        (PIXELS, {"batch_size": 2.5}, "--train.batch-size", "2.5"),
        (PIXELS, {"label_dropout": 1.5}, "--train.label-dropout", "1.5"),
        (PIXELS, {"ema_decay": 1.0}, "--train.ema-decay", "1.0"),
        (PIXELS, {"score_num": 128}, "--train.score-num", "128"),
        (PIXELS, {"data.name": "nonsense"}, "--data.name", "nonsense"),
        (PIXELS, {"objective": "nonsense"}, "--diffusion.objective", "nonsense"),
        (PIXELS, {"schedule": "nonsense"}, "--diffusion.schedule", "nonsense"),
        (PIXELS, {"timestep_sampling": "nonsense"}, "--train.timestep-sampling", "nonsense"),
        (PIXELS, {"precision": "fp8"}, "--precision", "fp8"),
        (PIXELS, {"flip": "yes"}, "--data.flip", "yes"),
        (PIXELS, {"sample_guidance_interval": (1, 2, 3)}, "--train.sample-guidance-interval", "(1, 2, 3)"),
        (PIXELS, {"dim_mults": (1, 0)}, "--model.dim-mults", "(1, 0)"),
        (PIXELS, {"dim_mults": ()}, "--model.dim-mults", "()"),
        (AUTOENCODER, {"ch_mult": ()}, "--model.ch-mult", "()"),
        (LATENT, {"channel_mult": ()}, "--model.channel-mult", "()"),
        (PIXELS, {"model": None}, "--model", "None"),
        (AUTOENCODER, {"adam_betas": (0.9, 1.0)}, "--train.adam-betas", "(0.9, 1.0)"),
        (POINTS, {"data.name": "nonsense"}, "--data.name", "nonsense"),
        # of all runs
        (PIXELS, {"total_steps": 0}, "--train.total-steps", "0"),
        (PIXELS, {"init_ignore": ("decoder.",)}, "--init-ignore", "--init-from"),
        (PIXELS, {"init_partial": True}, "--init-partial", "--init-from"),
        (PIXELS, {"init_ema": True}, "--init-ema", "--init-from"),
        (PIXELS, {"ema_lengths": (0.1, 0.9)}, "--train.ema-lengths", "0.9"),
        (PIXELS, {"sample_steps": 5000}, "--train.sample-steps", "5000"),
        (POINTS, {"num_timesteps": 20}, "--train.sample-steps", "20"),
        (PIXELS, {"matte": "no colour"}, "--data.matte", "no colour"),
        (PIXELS, {"matte": "#00000080"}, "--data.matte", "#00000080"),
        (PIXELS, {"validation": 1.0}, "--data.validation", "[0, 1)"),
        (PIXELS, {"optimizer": "sgd"}, "--train.optimizer", "sgd"),
        (PIXELS, {"optimizer": "muon", "lora_rank": 2, "init_from": "run"}, "--train.optimizer muon", "--train.lora-rank"),
        # pixels
        (PIXELS, {"data.size": 30}, "--data.size", "32"),
        (PIXELS, {"condition": "mask"}, "--data.condition mask", "--model.cond-channels 2"),
        (PIXELS, {"cond_channels": 1}, "--model.cond-channels", "0"),
        (PRESETS["quick-upscale"], {"lowres_size": 5}, "--data.lowres-size", "5"),
        (PRESETS["quick-upscale"], {"lowres_size": 56}, "--data.lowres-size", "56"),
        (PIXELS, {"score_every": 2, "data.size": 32, "data.name": "image-folder"}, "--train.score-every", "28"),
        (PIXELS, {"score_every": 2, "channels": 3, "data.name": "image-folder"}, "--train.score-every", "28"),
        # points
        (POINTS, {"num_timesteps": 1001}, "--model.num-embeddings", "1001"),
        # autoencoders
        (AUTOENCODER, {"data.size": 30}, "--data.size", "30"),
        (AUTOENCODER, {"condition": "gray"}, "--data.condition", "gray"),
        (AUTOENCODER, {"disc_layers": 5}, "--train.disc-layers", "5"),
        (AUTOENCODER, {"vgg": "vgg.pth"}, "--train.vgg", "--train.lpips"),
        (AUTOENCODER, {"lpips": "lpips.pth"}, "--train.vgg", "--train.lpips"),
        (AUTOENCODER, {"out_channels": 2}, "--model.out-channels", "2"),
        (PRESETS["autoencoder-vq"], {"n_embed": 0}, "--model.n-embed", "0"),
        (PRESETS["autoencoder-vq"], {"unknown_index": "all"}, "--model.unknown-index", "random, extra"),
        # latents
        (LATENT, {"latent_size": 7}, "--model.latent-size", "7"),
        (LATENT, {"out_channels": 3}, "--model.out-channels", "--model.in-channels"),
        (LATENT, {"n_embed": 3}, "--model.out-channels", "n-embed"),
        (LATENT, {"first_stage_patch": 64}, "--first-stage-patch", "64"),
        (LATENT, {"latent_scale": 0.0}, "--latent-scale", "0"),
        (LATENT, {"data.condition": "gray"}, "--data.condition", "gray"),
        (LATENT, {"cond_channels": 2}, "--model.cond-channels", "0"),
        (LATENT, {"flip": True}, "--data.no-flip", "flipped"),
        (LATENT, {"score_every": 2, "data.name": "image-folder"}, "--train.score-every", "28"),
    ],
)
def test_values_that_do_not_fit(config, values, flag, shown):
    with pytest.raises(UserError) as error:
        override(config, **values).check()
    assert flag in str(error.value) and shown in str(error.value) and "\n" not in str(error.value)


def test_values_that_fit_together():
    override(PIXELS, total_steps=0, init_from="weights.safetensors", init_ignore=("a.",), init_partial=True).check()
    override(PRESETS["quick-upscale"], lowres_size=14).check()
    override(AUTOENCODER, vgg="vgg.pth", lpips="lpips.pth", disc_weight=0.0, disc_layers=5).check()
    lists = override(POINTS, num_timesteps=1000, ema_lengths=[0.05, 0.1])
    lists.check()
    assert lists == override(POINTS, num_timesteps=1000, ema_lengths=(0.05, 0.1))
    override(PIXELS, matte="#10Fa20", validation=0.1).check()
    override(PIXELS, score_every=2, **{"data.size": 28, "data.name": "image-folder"}).check()


@pytest.mark.parametrize(
    ("config", "values", "word"),
    [
        (PIXELS, {"dim": 12}, "12"),
        (PIXELS, {"zero_terminal_snr": True, "objective": "eps"}, "objective"),
        (PIXELS, {"gamma": 2.0}, "weighting"),
        (LATENT, {"num_classes": None}, "condition"),
        (LATENT, {"context_dim": None}, "context_dim"),
        (AUTOENCODER, {"resolution": 30}, "30"),
        (PRESETS["autoencoder-vq"], {"remap": "gone.npy"}, "gone.npy cannot be read"),
        (PRESETS["latent-text"], {"context_dim": 2}, "context_dim is 2"),
    ],
)
def test_networks_and_processes_that_cannot_be_built(config, values, word):
    with pytest.raises(UserError, match=word):
        override(config, **values).task().build()


# override


def test_override():
    config = override(PIXELS, lr=0.5, dim=16, precision="fp16", **{"data.size": 32, "train.total_steps": 7})
    assert (config.train.lr, config.model.dim, config.precision) == (0.5, 16, "fp16")
    assert (config.data.size, config.train.total_steps) == (32, 7)
    assert PIXELS.train.lr == 3e-3 and override(PIXELS) == PIXELS
    assert override(PIXELS, **{"diffusion.timesteps": 9}).diffusion.num_timesteps == 9  # its old name
    assert override(LATENT, first_stage="runs/a", num_classes=3).model.num_classes == 3
    assert override(PIXELS, train=replace(PIXELS.train, lr=1.0)).train.lr == 1.0


@pytest.mark.parametrize(("name", "close"), [("total_step", "total_steps"), ("data.siz", "data.size"), ("xyz", None)])
def test_override_of_unknown_names(name, close):
    with pytest.raises(UserError, match=f"'{name}'" + (f".*'{close}'" if close else "$")):
        override(PIXELS, **{name: 1})


def test_override_of_a_section_that_is_none():
    with pytest.raises(UserError, match="'lr'"):
        override(PIXELS, train=None, lr=1.0)


# The command line over a preset


def test_flags_over_a_preset():
    args = parse_args("--preset=fashion-mnist --train.lr 1e-4 --train.batch_size 4 --model.dim-mults 1 2".split())
    assert args.config == override(PRESETS["fashion-mnist"], lr=1e-4, batch_size=4, dim_mults=(1, 2))
    assert args.preset == "fashion-mnist" and args.run_dir is None and args.device == "auto"
    assert parse_args([]).config == PRESETS["quick"]
    args = parse_args("--preset latent --first-stage runs/a --model.num-classes None --data.flip --run_dir x".split())
    assert args.config == override(LATENT, first_stage="runs/a", num_classes=None, flip=True) and args.run_dir == "x"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_flags(name):
    assert parse_args(["--preset", name, "--train.seed", "3"]).config == override(PRESETS[name], seed=3)


def test_renamed_flags(capsys):
    args = parse_args("--diffusion.timesteps 90 --train.timesteps=antithetic".split())
    assert args.config == override(PIXELS, num_timesteps=90, timestep_sampling="antithetic")
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and "--diffusion.timesteps" in notes[0] and "--diffusion.num-timesteps" in notes[0]
    assert "--train.timestep-sampling" in notes[1]
    assert parse_args("--preset scurve --model.timesteps 2000".split()).config.model.num_embeddings == 2000
    text = parse_args("--preset latent-text --model.words 39 --model.length 8".split()).config
    assert text == PRESETS["latent-text"]
    betas = parse_args("--preset autoencoder --train.betas 0.5 0.6".split()).config.train.adam_betas
    assert betas == (0.5, 0.6) and capsys.readouterr().err.count("\n") == 4
    assert set(RENAMED.values()) <= {f"{s}.{f.name}" for c in PRESETS.values() for s in vars(c) for f in section(c, s)}


def section(config, name):
    value = getattr(config, name)
    return fields(value) if hasattr(value, "__dataclass_fields__") else ()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ("--preset quik", "quik"),
        ("--preset", "preset"),
        ("--train.lrr 1", "--train.lrr: did you mean --train.lr?"),
        ("--preset scurve --train.score-every 2", "--train.score-every"),
        ("--preset quick --first-stage runs/a", "--first-stage"),
        ("--train.lr abc", "abc"),
        ("--train.lr", "--train.lr"),
        ("surplus", "surplus"),
        ("--num_gpus 8", "--num_gpus"),
        ("--device tpu", "tpu"),
        ("--precision fp8", "fp8"),
        ("--model.dim-mults x", "dim-mults"),
    ],
)
def test_bad_flags(args, word):
    with pytest.raises(UserError) as error:
        parse_args(args.split())
    assert word in str(error.value) and "\n" not in str(error.value)


# config.json


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_comes_back(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS[name].to_record()))
    assert Config.from_json(path) == PRESETS[name]


@pytest.mark.parametrize("name", OLD)
def test_config_json_of_before_is_read(name):
    assert config_from_record(old_record(name)) == PRESETS[name]


def test_even_older_records_lack_fields():
    record = old_record("quick")
    for gone in ("first_stage", "latent_scale", "first_stage_patch", "init_from", "init_ema"):
        del record[gone]
    del record["diffusion"]["l_simple_weight"], record["train"]["score_every"], record["model"]["patch_size"]
    assert config_from_record(record) == override(PRESETS["quick"], patch_size=1)
    points = old_record("scurve")
    assert config_from_record(points | {"data": points["data"] | {"name": POINTS_FILE}}).data.name == POINTS_FILE


BAD_FILES = [
    "",
    "[]",
    "3",
    "{}x",
    "null",
    '{"data": 3}',
    '{"kind": "nonsense"}',
    '{"kind": "pixels", "x": 1}',
    "[" * 100_000,
]
BAD_FILES += [
    '{"kind": ["pixels"]}',
    '{"kind": "pixels", "a\\nb": 1}',
    '{"x": ' * 500 + "1" + "}" * 500,
    "\ud800",
    '{"data": NaN}',
    '{"kind": "pixels", "diffusion": {"betas_file": "/dev/zero"}}',
]


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: ascii(text[:20]))
def test_files_that_are_no_config_json(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="config.json") as error:
        Config.from_json(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere"):
        Config.from_json(tmp_path / "nowhere")


def test_versions(tmp_path):
    """A record says its version. One without is older and is migrated; a newer one is not guessed at."""
    path, record = tmp_path / "config.json", PIXELS.to_record()
    assert record["version"] == len(MIGRATIONS) >= 1
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "version"}))
    assert Config.from_json(path) == PIXELS
    old = {key: value for key, value in record.items() if key not in ("version", "kind")}
    old["diffusion"] = dict(old["diffusion"], timesteps=old["diffusion"]["num_timesteps"])
    del old["diffusion"]["num_timesteps"]
    path.write_text(json.dumps(old))
    assert Config.from_json(path) == PIXELS
    path.write_text(json.dumps(record | {"version": len(MIGRATIONS) + 1, "kind": "of the future"}))
    with pytest.raises(UserError, match="update ms_diffusion"):
        Config.from_json(path)
    for version in (-1, 1.5, "1", None, True, 10**30):
        path.write_text(json.dumps(record | {"version": version}))
        with pytest.raises(UserError, match="config.json"):
            Config.from_json(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.lr", "fast"),
        ("train.lr", -1.0),
        ("train.lr", float("nan")),
        ("train.lr", float("inf")),
        ("train.lr", 10**400),
        ("train.total_steps", 3e9),
        ("train.total_steps", 3_000_000_000),
        ("train.batch_size", 10**30),
        ("train.seed", -1),
        ("train.ema_lengths", [0.1] * 1000),
        ("train.unknown", 1),
        ("data.name", 7),
        ("data.name", "x" * 100_000),
        ("data.size", True),
        ("data.dir", "a\0b"),
        ("data.dir", "\ud800"),
        ("data.flip", 1),
        ("model.dim", None),
        ("model.dim", [28]),
        ("model.dim_mults", [1, [2]]),
        ("model.dim_mults", {"1": 2}),
        ("model.dim_mults", [1] * 1000),
        ("diffusion.schedule", ["cosine"]),
        ("precision", {}),
        ("init_ignore", "decoder."),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_values_are_checked_when_a_file_is_read(tmp_path, name, value):
    """Their types and ranges; the line names the field, and is short."""
    path, record = tmp_path / "config.json", json.loads(json.dumps(PIXELS.to_record()))
    section, _, last = name.rpartition(".")
    (record[section] if section else record)[last] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        Config.from_json(path)
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (PIXELS, {"model.dim": 10**9}),
        (PIXELS, {"model.dim": 4_000_000}),
        (PIXELS, {"num_timesteps": 10**12}),
        (PIXELS, {"num_classes": 10**10}),
        (PIXELS, {"dim_mults": (1, 10**9)}),
        (POINTS, {"model.dim": 10**9}),
        (POINTS, {"num_embeddings": 10**12, "num_timesteps": 10**12}),
        (POINTS, {"frequencies": 10**10}),
        (POINTS, {"depth": 10**9}),
        (AUTOENCODER, {"ch": 10**8}),
        (AUTOENCODER, {"num_res_blocks": 10**9}),
        (PRESETS["autoencoder-vq"], {"n_embed": 10**10}),
        (LATENT, {"model_channels": 10**9, "num_head_channels": None, "num_heads": 1}),
        (LATENT, {"context_dim": 10**10}),
    ],
    ids=str,
)
def test_networks_beyond_the_memory(config, values):
    """Refused before memory is taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        override(config, **values).task().build()
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 1_000_000  # KiB


# Whatever the values are

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3000), st.floats(), st.text(max_size=5))
VALUES = st.one_of(SCALARS, st.tuples(SCALARS), st.tuples(SCALARS, SCALARS), st.lists(SCALARS, max_size=2))
NAMES = {
    name: [f"{s}.{f.name}" for s in vars(config) for f in section(config, s)] + list(vars(config))
    for name, config in PRESETS.items()
    if name in ("quick-class", "scurve", "scurve-seed", "autoencoder", "autoencoder-vq", "latent-text")
}
CHANGES = st.sampled_from(list(NAMES)).flatmap(
    lambda name: st.tuples(st.just(name), st.dictionaries(st.sampled_from(NAMES[name]), VALUES, min_size=1, max_size=3))
)


@settings(max_examples=300, deadline=None)
@example(("autoencoder", {"model.resolution": True}))
@example(("autoencoder", {"data": None, "data.name": None}))
@given(CHANGES)
def test_only_user_errors_come_of_random_values(changes):
    name, values = changes
    try:
        override(PRESETS[name], **values).check()
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(CHANGES)
def test_only_user_errors_come_of_random_files(tmp_path_factory, changes):
    name, values = changes
    record = PRESETS[name].to_record()
    for dotted, value in values.items():
        part, _, last = dotted.rpartition(".")
        owner = record[part] if part else record
        if isinstance(owner, dict):
            owner[last] = value
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(record))
    try:
        Config.from_json(path).check()
    except UserError as error:
        assert "\n" not in str(error)


FLAGS = st.sampled_from(
    ["--train.lr", "--preset", "--data.size", "--model.dim-mults", "--precision", "--init-ignore", "--x"]
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(FLAGS, st.sampled_from(["1", "quick", "fp16", "None"]), st.text(max_size=4)), max_size=4))
def test_only_user_errors_come_of_random_flags(argv):
    try:
        parse_args(argv)
    except UserError as error:
        assert "\n" not in str(error)
    except SystemExit as end:
        assert not end.code and {"-h", "--help"} & set(argv)
