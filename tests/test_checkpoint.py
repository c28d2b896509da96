"""Checkpoints: what is saved comes back exactly, and nothing that happens to the files or the disk goes unseen."""

import errno
import hashlib
import json
import os
import resource
import shutil

import numpy as np
import pytest
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion.runtime import UserError, compiled
from ms_diffusion.training import checkpoint as checkpoint_module
from ms_diffusion.training.checkpoint import (
    Checkpoint,
    Unreadable,
    best_checkpoint,
    checkpoints,
    read_config,
    read_newest,
    read_state,
    read_weights,
)
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import check_same_run
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step


class Net(nn.Cell):
    """x (B, 3) -> (B, width)."""

    def __init__(self, width=2, name="weight"):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight = Parameter(Tensor(rng.standard_normal((3, width), dtype=np.float32)), name=name)
        self.scale = Parameter(Tensor(np.full(1, 1.5, np.float32)), name="scale")

    def construct(self, x):
        return ops.matmul(x, self.weight) * self.scale


def squared_error(net):
    def loss_fn(x):
        return ops.square(net(x) - 1).mean()

    return loss_fn


class Run:
    """A little training run and its checkpoints."""

    def __init__(self, folder, keep=3, net=None):
        self.net = net or Net()
        self.ema = EMA(self.net, 0.9)
        self.optimizer = make_optimizer(self.net, 0.1, 1, 20)
        self.scaler = ms.amp.DynamicLossScaler(scale_value=2.0**4, scale_factor=2, scale_window=2)
        self.train_step = make_train_step(squared_error(self.net), self.optimizer, self.ema, loss_scaler=self.scaler)
        self.checkpoint = self.checkpoints(folder, keep)

    def checkpoints(self, folder, keep=3):
        return Checkpoint(folder, self.net, self.optimizer, self.ema, loss_scaler=self.scaler, keep=keep)

    def train(self, *steps):
        return [float(self.train_step(batch(step))[0].asnumpy()) for step in steps]

    def state(self):
        parameters = [*self.optimizer.get_parameters(), *self.ema.averages, self.scaler.scale_value, self.scaler.counter]
        return [p.asnumpy().copy() for p in parameters]


def batch(step):
    return Tensor(np.random.default_rng(step).standard_normal((4, 3), dtype=np.float32))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints at 1, 2 and 3, its state at each, and the losses of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("run")
    run, states = Run(folder), {}
    for step in (1, 2, 3):
        run.train(step)
        run.checkpoint.save(step, seed=7)
        states[step] = run.state()
    return folder, run, states, run.train(4, 5)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of those checkpoints to damage."""
    return shutil.copytree(trained[0], tmp_path / "run")


def step_folder(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:07d}"


# There and back


def test_a_new_run_is_restored_exactly_and_goes_on_the_same(trained, folder):
    _, _, states, losses = trained
    run = Run(folder)
    state = run.checkpoint.load_latest()
    assert state["step"] == 3 and state["seed"] == 7
    assert_same(run.state(), states[3])
    assert run.train(4, 5) == losses


def test_graphs_that_have_run_see_what_is_loaded(trained, folder):
    """MindSpore's own load_param_into_net leaves the old values in compiled graphs."""
    _, run, states, losses = trained

    def predict(x):
        return run.ema.net(x)

    graph = compiled(predict)
    late = graph(batch(9)).asnumpy()
    run.train(6)
    run.checkpoint.load_latest()
    assert_same(run.state(), states[3])
    weight, scale = (p.asnumpy() for p in run.ema.averages)
    np.testing.assert_allclose(graph(batch(9)).asnumpy(), batch(9).asnumpy() @ weight * scale, rtol=1e-5, atol=1e-6)
    assert np.abs(graph(batch(9)).asnumpy() - late).max() > 1e-3
    assert run.train(4, 5) == losses


def test_no_checkpoint_is_none(tmp_path):
    assert Run(tmp_path).checkpoint.load_latest() is None
    assert checkpoints(tmp_path / "nowhere") == []


def test_two_parameters_of_one_name_are_refused(tmp_path):
    run, extra = Run(tmp_path), [Parameter(Tensor([1.0]), name=name) for name in ("kept", "twice", "twice")]
    Checkpoint(tmp_path, run.net, run.optimizer, extra_parameters=extra[:2])
    with pytest.raises(ValueError, match="two parameters are named twice"):
        Checkpoint(tmp_path, run.net, run.optimizer, extra_parameters=extra)


def test_only_the_newest_stay(tmp_path):
    checkpoint = Checkpoint(tmp_path, Net(), keep=2)
    for step in (5, 10, 100, 20000):
        checkpoint.save(step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-0000100", "step-0020000"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-0000100", "step-0020000"]


def saved(folder, *scores, keep=2):
    """The steps that stay, and the best of them, where step i is saved with scores[i - 1], if that is one."""
    checkpoint = Checkpoint(folder, Net(), keep=keep)
    for step, score in enumerate(scores, 1):
        checkpoint.save(step, **({} if score is None else {"fid": score}))
    best = best_checkpoint(folder)
    return [read_state(path)["step"] for path in checkpoints(folder)], best and read_state(best)["step"]


@pytest.mark.parametrize(
    ("scores", "stay", "best"),
    [
        ((9.0, 5.0, 8.0, 7.0, 6.0), [2, 4, 5], 2),
        ((9.0, 5.0, 8.0, 4.0, 6.0), [4, 5], 4),  # a better one lets the old best go
        ((9.0, 5.0, 8.0, 7.0, 3.0), [4, 5], 5),
        ((5.0, 5.0, 5.0, 5.0), [1, 3, 4], 1),
        ((None, 70.0, None, None, None), [2, 4, 5], 2),
        ((None, 7.0, None, 9.0, None, None), [2, 5, 6], 2),
        ((8.0, -0.1, 8.0, 8.0, 8.0), [2, 4, 5], 2),  # by rounding
        ((None,) * 5, [4, 5], None),
        ((3.0,), [1], 1),
        ((), [], None),
    ],
)
def test_the_best_scored_stays_besides_the_newest(tmp_path, scores, stay, best):
    """It is that of the lowest FID, of equals the first."""
    assert saved(tmp_path, *scores) == (stay, best)


def test_no_score_is_better_than_0(tmp_path):
    assert saved(tmp_path, 5.0, 0.0, 4.0, 3.0, 2.0) == ([2, 4, 5], 2)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_best_is_kept_in_addition(tmp_path, keep):
    stay, best = saved(tmp_path, 9.0, 1.0, *range(10, 20), keep=keep)
    assert stay == [2, *range(13 - keep, 13)] and best == 2


def test_the_newest_is_what_training_goes_on_from(tmp_path):
    saved(tmp_path, 1.0, 9.0, 9.0, 9.0)
    assert Checkpoint(tmp_path, Net()).load_latest()["step"] == 4


@pytest.mark.parametrize("text", [b"garbage", b'{"step": 2, "fid": 1.0}'])
def test_a_corrupt_state_has_no_score(tmp_path, text):
    saved(tmp_path, 9.0, 1.0, 5.0, 7.0)
    (step_folder(tmp_path, 2) / "state.json").write_bytes(text)
    assert best_checkpoint(tmp_path) == step_folder(tmp_path, 3)
    Checkpoint(tmp_path, Net(), keep=1).save(5, fid=6.0)
    assert checkpoints(tmp_path) == [step_folder(tmp_path, 3), step_folder(tmp_path, 5)]


def test_a_step_can_be_saved_again(tmp_path):
    net = Net()
    checkpoint = Checkpoint(tmp_path, net)
    checkpoint.save(1)
    ops.assign(net.weight, Tensor(np.full((3, 2), 8, np.float32)))
    checkpoint.save(1)
    assert (read_weights(step_folder(tmp_path, 1), "model")["weight"] == 8).all()


def test_files_are_plain_arrays_and_json_with_true_hashes(folder):
    files = sorted(step_folder(folder, 3).iterdir())
    assert [f.name for f in files] == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    state = json.loads(files[-1].read_text())
    assert set(state["versions"]) == {"mindspore", "numpy", "python"}
    for file in files[:-1]:
        data = file.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))  # neither a pickle nor PyTorch's or NumPy's archive
        assert all(isinstance(a, np.ndarray) and a.dtype != object for a in safetensors.numpy.load(data).values())
        assert state["sha256"][file.name] == hashlib.sha256(data).hexdigest()
    assert list(safetensors.numpy.load_file(files[0])) == ["scale", "weight"]  # the network's names, without "ema."


# Values

POISON = [np.nan, np.inf, -np.inf, 2e10]


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_what_is_not_finite_is_never_saved(tmp_path, value, file):
    """The error names the parameter, the last good checkpoint, and what to try. Moments may be large."""
    run = Run(tmp_path)
    run.checkpoint.save(1)
    parameter = run.checkpoint.files[file]["moment2.weight" if file == "optimizer" else "weight"]
    values = np.ones(parameter.shape, np.float32)
    values[1, 1] = value
    parameter.set_data(Tensor(values))
    if file == "optimizer" and np.isfinite(value):
        run.checkpoint.save(2)
        return
    with pytest.raises(UserError, match="weight .*step-0000001 stands.*--train.lr"):
        run.checkpoint.save(2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-0000001"]


@pytest.mark.parametrize("value", POISON)
def test_what_is_not_finite_is_never_loaded(trained, folder, capsys, value):
    _, run, states, _ = trained
    rewrite(step_folder(folder, 3), "ema", lambda arrays: arrays["scale"].fill(value))
    assert run.checkpoints(folder).load_latest()["step"] == 2
    assert_same(run.state(), states[2])
    with pytest.raises(UserError, match="scale is"):
        read_weights(step_folder(folder, 3).with_name("spoilt-step-0000003"), "ema")


def rewrite(folder, name, change):
    """Change the arrays of a file of a checkpoint, and its SHA-256 in state.json."""
    arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")
    change(arrays)
    write_with_hash(folder, name, safetensors.numpy.save(arrays))


def write_with_hash(folder, name, data):
    (folder / f"{name}.safetensors").write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))


# Corrupt files


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def remove(file):
    file.unlink()


def writes(text):
    def garbage(file):
        file.write_bytes(text)

    return garbage


DAMAGE = [
    *[(how, name) for how in (truncate, flip_a_bit, remove) for name in ("model", "ema", "optimizer")],
    (truncate, "state"),
    *[(writes(text), "state") for text in (b"garbage", b"\xff\xfe\x00", b"[1]", b'{"step": "3", "sha256": {}}')],
    (writes(b'{"step": 3, "sha256": 3}'), "state"),
    (writes(b"[" * 100_000), "state"),
]


def damage(run_dir, step, how, name):
    how(step_folder(run_dir, step) / (f"{name}.json" if name == "state" else f"{name}.safetensors"))


@pytest.mark.parametrize("how, name", DAMAGE)
def test_a_corrupt_checkpoint_is_skipped_and_the_previous_one_is_used(trained, folder, capsys, how, name):
    _, run, states, _ = trained
    damage(folder, 3, how, name)
    checkpoint = run.checkpoints(folder)
    assert checkpoint.load_latest()["step"] == 2
    assert_same(run.state(), states[2])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: ") and "step-0000003" in err


@pytest.mark.parametrize(
    "change",
    [
        {"step": -3},
        {"step": 3.0},
        {"step": 2**70},
        {"fid": "good"},
        {"fid": float("nan")},
        {"losses": {"unknown": 1.0}},
        {"losses": {"total": "x"}},
        {"losses": []},
        {"unfinished": "no"},
        {"latent_scale": 0},
        {"latent_scale": "1"},
        {"world_size": 0, "batch_size": 1, "config": {"train": {}}},
        {"world_size": 1, "config": {"train": {}}},
        {"world_size": 1, "batch_size": 8, "config": {"train": 3}},
        {"config": "x"},
        {"first_stage": "x"},
        {"sha256": {"../model.safetensors": "0" * 64}},
        {"sha256": {"model.safetensors": "short"}},
    ],
    ids=str,
)
def test_a_state_with_wrong_values_is_corrupt(trained, folder, change):
    _, run, _, _ = trained
    path = step_folder(folder, 3) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_state(step_folder(folder, 3))
    assert "\n" not in str(error.value)
    assert run.checkpoints(folder).load_latest()["step"] == 2


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 100, (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"],
    ids=["empty", "noise", "long header", "no arrays"],
)
def test_a_damaged_file_with_a_true_hash(trained, folder, data):
    """Nobody's checkpoint has such a file; one without arrays is another network's."""
    _, run, _, _ = trained
    write_with_hash(step_folder(folder, 3), "optimizer", data)
    if data.endswith(b"{}") and data[0] == 2:
        with pytest.raises(UserError, match="another network"):
            run.checkpoints(folder).load_latest()
    else:
        assert run.checkpoints(folder).load_latest()["step"] == 2


def test_spoilt_checkpoints_are_set_aside_and_do_not_count(trained, folder, capsys):
    """With room for one checkpoint only, the one that is written next stays; nothing is deleted."""
    _, run, _, _ = trained
    for step in (2, 3):
        damage(folder, step, flip_a_bit, "model")
    checkpoint = run.checkpoints(folder, keep=1)
    assert checkpoint.load_latest()["step"] == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("spoilt-step" in line and "step-0000001" in line for line in err)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-0000001", "spoilt-step-0000002", "spoilt-step-0000003"}
    checkpoint.save(2)
    damage(folder, 2, flip_a_bit, "model")
    checkpoint.save(3)
    assert [path.name for path in checkpoints(folder)] == ["step-0000003"]
    assert checkpoint.load_latest()["step"] == 3


def test_the_checkpoint_just_written_stays_also_without_a_resume(tmp_path):
    checkpoint = Checkpoint(tmp_path, Net(), keep=1)
    for step in (5, 6):
        checkpoint.save(step)
    (step_folder(tmp_path, 6) / "state.json").write_text("{")
    checkpoint.save(3)
    assert step_folder(tmp_path, 3) in checkpoints(tmp_path)
    assert Checkpoint(tmp_path, Net()).load_latest()["step"] == 3


def test_a_step_that_was_being_saved_again(trained, folder):
    """After a crash in between there is the old one alone, or the new one beside the old one."""
    _, run, states, _ = trained
    old = step_folder(folder, 3).rename(folder / "checkpoints/step-0000003.old")
    assert [path.name for path in checkpoints(folder)][-1] == old.name
    assert run.checkpoints(folder).load_latest()["step"] == 3
    assert_same(run.state(), states[3])
    assert checkpoints(folder)[-1] == step_folder(folder, 3) and not old.exists()
    shutil.copytree(step_folder(folder, 3), old)
    checkpoint = run.checkpoints(folder, keep=2)
    checkpoint.update(3, fid=1.0)  # which tells them apart
    assert [path.name for path in checkpoints(folder)] == ["step-0000002", "step-0000003"]
    shutil.copytree(step_folder(folder, 2), old)
    damage(folder, 3, flip_a_bit, "model")
    assert checkpoint.load_latest()["step"] == 2


# Readers beside a writer


def test_readers_take_the_newest_intact_one_and_change_nothing(folder, capsys):
    damage(folder, 3, flip_a_bit, "ema")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = read_newest(folder, ["ema"])
    assert found.state["step"] == 2 and found.folder == step_folder(folder, 2)
    assert capsys.readouterr().err.count("warning: ") == 1
    assert read_newest(folder, ["model"]).state["step"] == 3  # whose other files are well
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_readers_while_a_writer_rotates(tmp_path, monkeypatch, capsys):
    """At each read the writer has just replaced or deleted what the reader has found: it reads what is there then."""
    checkpoint, real, writes = Checkpoint(tmp_path, Net(), keep=1), checkpoint_module.read_weights, iter([1, 2, 2, 3])
    weight = checkpoint.files["model"]["weight"]
    checkpoint.save(1)

    def rotating(folder, name, state=None):
        if step := next(writes, None):
            ops.assign(weight, weight + 1)
            checkpoint.save(step)
        return real(folder, name, state)

    monkeypatch.setattr(checkpoint_module, "read_weights", rotating)
    found = read_newest(tmp_path, ["model"])
    assert found.state["step"] == 3 and (found.arrays["model"]["weight"] == weight.asnumpy()).all()
    assert not capsys.readouterr().err


# config.json beside the checkpoints


@pytest.mark.parametrize("text", [None, "", "{", '{"version": 1}', '{"kind": "pixels", "train": {"seed": "x"}}'])
def test_a_lost_config_is_that_of_a_checkpoint(tmp_path, capsys, text):
    config = override(PRESETS["quick"], seed=5)
    assert read_config(tmp_path) is None  # there is no run
    for step in (1, 2):
        Checkpoint(tmp_path, Net()).save(step, config=config.to_record())
    (step_folder(tmp_path, 2) / "state.json").write_text("{")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path) == config
    assert capsys.readouterr().err.count("warning: ") == 1
    check_same_run(tmp_path, config)
    with pytest.raises(UserError, match="another seed"):
        check_same_run(tmp_path, override(config, seed=6))


def test_a_lost_config_without_a_copy(tmp_path):
    Checkpoint(tmp_path, Net()).save(1)
    with pytest.raises(UserError, match="config.json"):
        read_config(tmp_path)


def test_a_folder_without_state_is_no_checkpoint(trained, folder):
    _, run, _, _ = trained
    damage(folder, 3, remove, "state")
    assert run.checkpoints(folder).load_latest()["step"] == 2


def test_all_corrupt(trained, folder, capsys):
    _, run, _, _ = trained
    before = run.state()
    for step in (1, 2, 3):
        damage(folder, step, flip_a_bit, "optimizer")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run.checkpoints(folder).load_latest()
    assert capsys.readouterr().err.count("warning:") == 3
    assert_same(run.state(), before)


@pytest.mark.parametrize("net, named", [({"width": 5}, "weight"), ({"name": "kernel"}, "kernel")])
def test_a_foreign_network_is_named(folder, net, named):
    run = Run(folder, net=Net(**net))
    before = run.state()
    with pytest.raises(UserError, match=named):
        run.checkpoint.load_latest()
    assert_same(run.state(), before)


# A full disk


@pytest.mark.parametrize("synced", [0, 1, 2, 3, 4, 5], ids=["model", "ema", "optimizer", "state", "its folder", "folder"])
def test_a_full_disk_leaves_the_earlier_checkpoint(trained, folder, monkeypatch, synced):
    """The disk is full when the file after `synced` others is synced; or, at the last, the folder."""
    _, run, states, _ = trained
    checkpoint, calls = run.checkpoints(folder), iter(range(6))

    def fsync(_):
        if next(calls) == synced:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoint.save(4)
    whole = synced == 5  # the rename came before
    assert sorted(os.listdir(folder / "checkpoints")) == [f"step-000000{i}" for i in (1, 2, 3, 4)[: 3 + whole]]
    if not whole:
        assert checkpoint.load_latest()["step"] == 3
        assert_same(run.state(), states[3])


def test_a_file_that_the_system_refuses_to_grow(tmp_path):
    net = Net(width=250_000)  # 3 MB
    checkpoint = Checkpoint(tmp_path, net)
    checkpoint.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            checkpoint.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "checkpoints") == ["step-0000001"]
    assert checkpoint.load_latest()["step"] == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        Checkpoint(tmp_path, Net()).save(1)


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error"), UserError("no memory")]
)
@pytest.mark.parametrize("file", ["read_bytes", "read_json"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_spoilt(trained, folder, monkeypatch, error, file):
    """None is set aside or passed over, since it may be intact."""
    if isinstance(error, UserError) and file == "read_json":
        pytest.skip("a state.json is small")

    def refuse(*_):
        raise error

    before = sorted(os.listdir(folder / "checkpoints"))
    monkeypatch.setattr(checkpoint_module, file, refuse)
    with pytest.raises(Unreadable):
        Run(folder).checkpoint.load_latest()
    with pytest.raises(Unreadable):
        read_newest(folder, ["ema"])
    monkeypatch.undo()
    assert sorted(os.listdir(folder / "checkpoints")) == before and read_newest(folder, ["ema"]).state["step"] == 3
