"""The list of runs, and the command that goes on with one: what is read, in what state a run is, what is damaged."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from runs import PIXELS, assert_refused, call, succeed, tree

from ms_diffusion.commands.runs import Summary, summarize
from ms_diffusion.commands.train import command_of, parse_args
from ms_diffusion.locks import find_writer, sole_writer
from ms_diffusion.training.config import override
from ms_diffusion.training.presets import PRESETS

CHANGED = {
    "quick": {"lr_decay": False, "seed": 7, "data.dir": "a 'b' $c", "dim_mults": (1, 2, 2), "timestep_mean": -1.2},
    "fashion-mnist-dit": {"depth": 2, "sample_guidance_interval": None, "init_from": "runs/x y", "init_ignore": ()},
    "fashion-mnist-fast": {"consistency": (1.5, 2), "beta_start": 1e-5, "tensorboard": True},
    "scurve": {"epochs": 2.5, "total_steps": 99, "schedule": "betas", "betas": (0.1, 0.25), "num_timesteps": 2},
    "autoencoder-vq": {"data.name": "image-folder", "n_embed": 64, "adam_betas": (0.5, 0.9), "vgg": None},
    "latent-text": {"first_stage": "runs/auto", "latent_scale": 0.3, "model_channels": 16},
}


def make(run, config, step, rows=(), **state):
    """The folder of a run without its weights."""
    folder = run / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_record()))
    (folder / "state.json").write_text(json.dumps({"step": step, "sha256": {}, **state}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def lines(folder):
    """What `runs` prints of each run, by its folder's name."""
    titles, *found = succeed("runs", folder).splitlines()
    assert titles.split()[:4] == ["run", "kind", "data", "step"]
    return {Path(line.split("  ")[0]).name: line for line in found}


@pytest.mark.parametrize("preset", [*CHANGED, *(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS)])
def test_the_command_of_a_run_is_its_configuration(preset):
    config = override(PRESETS[preset], **{k: v for k, v in CHANGED.get(preset, {}).items() if k not in ("epochs",)})
    if "epochs" in CHANGED.get(preset, {}):
        config = replace(config, train=replace(config.train, epochs=CHANGED[preset]["epochs"]))
    words = shlex.split(command_of(config, "runs/a b"))
    args = parse_args(words[words.index("train") + 1 :])
    assert args.run_dir == "runs/a b" and len(words) < 40
    steps = {"total_steps": config.train.total_steps} if config.train.epochs else {}
    assert replace(args.config, train=replace(args.config.train, **steps)) == config


def test_runs_that_no_command_makes():
    assert command_of(override(PIXELS, **{"data.name": "arrays"}), "run") is None
    assert command_of(replace(PIXELS, model=None), "run") is None


def test_states(tmp_path):
    """Finished, stopped, being trained, scored, kept inside another; nothing is changed."""
    config, rows = override(PIXELS, total_steps=20), [{"step": step, "loss": 1 / step} for step in (5, 10)]
    make(tmp_path / "stopped", config, 5, rows)
    scores = [{"step": 10, "fid": 2.0}, {"step": 20, "fid": 3.0, "val_loss_ema": 1.0}]
    make(tmp_path / "done", config, 20, [*rows, *scores])
    make(tmp_path / "preview-is-missing", config, 20, unfinished=True)
    make(tmp_path / "writing", config, 10)
    inside = make(tmp_path / "deep" / "latent", PRESETS["latent"], 10_000) / "first_stage"
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps(PRESETS["autoencoder"].to_record()))
    (inside / "state.json").write_text(json.dumps({"step": 7, "sha256": {}}))
    (tmp_path / "done" / "export").mkdir()
    (tmp_path / "done" / "export" / "metrics.jsonl").write_text("")
    (tmp_path / "done" / "evaluation.json").write_text(
        json.dumps({"protocol": "", "samples": {"fid": 1.5}, "floor": {"fid": 1}})
    )
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)
    before = tree(tmp_path)
    with sole_writer(tmp_path / "writing"):
        found = lines(tmp_path)
    assert list(found) == ["latent", "first_stage", "done", "preview-is-missing", "stopped", "writing"]
    assert "10/20" in found["stopped"] and " 0.1 " in found["stopped"] and "--train.total-steps 20" in found["stopped"]
    assert "continue" not in found["done"] and "FID 1.5 (evaluated); FID 3, best 2" in found["done"]
    assert "continue" in found["preview-is-missing"] and "20/20" in found["preview-is-missing"]
    assert f"process {os.getpid()}" in found["writing"] and "continue" not in found["writing"]
    assert "autoencoder  fashion-mnist" in found["first_stage"] and "continue" not in found["first_stage"]
    assert tree(tmp_path) == before
    assert find_writer(tmp_path / "writing") is None
    listed = json.loads(succeed("runs", tmp_path / "stopped", "--json"))
    assert [Summary(**each) for each in listed] == [summarize(tmp_path / "stopped")] and listed[0]["loss"] == 0.1


def test_damaged_and_foreign_folders(tmp_path):
    """A line each that says what is wrong; what can be read of the others is there."""
    for name in ("config", "copy", "state", "metrics", "evaluation", "both\n"):
        make(tmp_path / name, PIXELS, 3, [{"step": 3, "loss": 0.5}])
    for name in ("config", "copy", "both\n"):
        (tmp_path / name / "config.json").write_text('{"kind": "nonsense"')
    state = tmp_path / "copy" / "checkpoints" / "step-0000003" / "state.json"
    state.write_text(json.dumps({"step": 3, "sha256": {}, "config": PIXELS.to_record()}))
    for name in ("state", "both\n"):
        (tmp_path / name / "checkpoints" / "step-0000003" / "state.json").write_text("[")
    (tmp_path / "metrics" / "metrics.jsonl").write_bytes(b'\xff\n{"step": "x"}\n[]\n{"step": 2, "loss": 0.25}\n{"st')
    (tmp_path / "evaluation" / "evaluation.json").write_text('{"samples": {"fid": "<b>"}, "protocol": 3}')
    (tmp_path / "foreign" / "checkpoints").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    found = lines(tmp_path)
    assert len(found) == 7
    assert "is not the config.json of a run" in found["config"] and "is not the config.json of a run" in found["both\\n"]
    assert "3/4800" in found["copy"] and "continue" in found["copy"]
    assert "no checkpoint can be read" in found["state"]
    assert "3/4800" in found["metrics"] and " 0.25 " in found["metrics"]
    assert "3/4800" in found["evaluation"] and "FID" not in found["evaluation"]
    assert "no config.json" in found["foreign"]


def test_no_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("runs"), "runs is not a folder")
    assert "no run" in succeed("runs", tmp_path)
    assert json.loads(succeed("runs", tmp_path, "--json")) == []
