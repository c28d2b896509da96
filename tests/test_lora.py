"""Low-rank updates of trained weights against float64 NumPy and PyTorch, and runs that start from other runs."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from runs import PIXELS, UNET, assert_refused, assert_same_run, call, checkpoint, succeed, untrained, weights
from test_latent_runs import AUTOENCODER, LATENT, TEXT
from test_points_runs import SMALL

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.data.image_set import ImageSet
from ms_diffusion.data.tokenizers import BytePairs
from ms_diffusion.models import layers
from ms_diffusion.models.unet_ldm import AttentionBlock, CrossAttention
from ms_diffusion.runtime import UserError, compiled
from ms_diffusion.training.checkpoint import Checkpoint
from ms_diffusion.training.config import override
from ms_diffusion.training.exchange import diffusers_models
from ms_diffusion.training.loop import train
from ms_diffusion.training.lora import LowRank
from ms_diffusion.training.pack import Pack
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import WEIGHTS, Run
from ms_diffusion.training.step import EMA, make_optimizer, make_train_step
from ms_diffusion.training.tasks.labels import Captions, keep
from ms_diffusion.training.tasks.latents import resolve_first_stage

LR, STEPS, CLIP, DECAY, RANK = 0.05, 4, 0.3, 0.2, 2


def values(parameters):
    return [p.asnumpy().copy() for p in parameters]


# One layer


class Layer(nn.Cell):
    """x (B, 3) -> (B, 4)."""

    def __init__(self):
        super().__init__()
        self.linear = layers.Linear(3, 4)
        layers.name_and_initialise(self, 0)

    def construct(self, x):
        return self.linear(x)


def reference(w_0, bias, a, b, data):
    """Losses, norms, and W = W_0 + B A (Hu et al. 2021, eq. 3), its average, A and B after the steps, in float64."""
    w_0, bias, p = np.float64(w_0), np.float64(bias), [np.float64(a), np.float64(b)]
    m, v, average, losses, norms = [0.0, 0.0], [0.0, 0.0], w_0, [], []
    for n, (x, y) in enumerate(data, 1):
        error = x @ (w_0 + p[1] @ p[0]).T + bias - y
        of_w = (2 * error / error.size).T @ x
        g = [p[1].T @ of_w, of_w @ p[0].T]
        losses.append((error**2).mean())
        norms.append(np.sqrt(sum((each**2).sum() for each in g)))
        g = [each * min(CLIP / (norms[-1] + 1e-6), 1) for each in g]
        for i in range(2):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
            p[i] = p[i] - LR * (m[i] / (1 - 0.9**n)) / (np.sqrt(v[i] / (1 - 0.999**n)) + 1e-8)
        mix = min(DECAY, (1 + n) / (10 + n))
        average = mix * average + (1 - mix) * (w_0 + p[1] @ p[0])
    return losses, norms, [w_0 + p[1] @ p[0], average, *p]


@pytest.mark.parametrize(("size", "how"), [(13, "kernels"), (1, "operators"), (13, "packed")])
def test_steps_equal_the_numpy_reference(size, how, monkeypatch):
    if how == "kernels" and not kernels.available():
        pytest.skip("needs a C++ compiler")
    if how == "operators":
        monkeypatch.setattr(kernels, "available", lambda: False)
    rng, net = np.random.default_rng(1), Layer()
    data = [(rng.normal(size=(size, 3)), rng.normal(size=(size, 4))) for _ in range(STEPS)]
    averages = EMA(net, DECAY), EMA(net, length=0.1)
    low_rank = LowRank(net, RANK, "all", 0)
    (w_0, bias), (a, b) = values(net.get_parameters()), values(low_rank.adapters)
    assert a.shape == (RANK, 3) and np.abs(a).max() <= 3**-0.5 and b.shape == (4, RANK) and not b.any()

    optimizer = make_optimizer(net, LR, 0, 1, extra_parameters=low_rank.adapters, decay=False)
    assert [p.name for p in optimizer.parameters] == ["linear.lora_A.weight", "linear.lora_B.weight"]
    pack = Pack(low_rank.updates, optimizer) if how == "packed" else None

    def loss_fn(x, y):
        return ops.square(net(x) - y).mean()

    options = {"clip_norm": CLIP, "extra_emas": averages[1:], "pack": pack, "low_rank": low_rank}
    step = make_train_step(loss_fn, optimizer, averages[0], **options)
    found = [[float(each) for each in step(np.float32(x), np.float32(y))] for x, y in data]
    if pack:
        assert pack.count == 2
        pack.write_back()
    losses, norms, state = reference(w_0, bias, a, b, data)
    assert max(norms) > CLIP > min(norms)
    np.testing.assert_allclose(found, np.transpose([losses, norms]), rtol=2e-5)
    weight, average = net.linear.weight, averages[0].net.linear.weight
    for ours, wanted in zip(values([weight, average, *low_rank.adapters]), state, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-6)
    assert 0 < np.abs(averages[1].net.linear.weight.asnumpy() - w_0).max() < 1
    for each in (net, averages[0].net, averages[1].net):  # what is frozen stays, bit for bit
        np.testing.assert_array_equal(each.linear.bias.asnumpy(), bias)

    before = values([weight, average, *low_rank.adapters])
    assert np.isnan(float(step(np.full((size, 3), np.nan, np.float32), np.float32(data[0][1]))[0]))  # a step that is skipped
    np.testing.assert_equal(values([weight, average, *low_rank.adapters]), before)


# All layers


class Net(nn.Cell):
    """x (B, 4, 4, 4), context (B, 3, 6) -> (B, 2): a layer of each sort, two of them attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = layers.conv2d(4, 4, 3, padding=1), layers.conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up = layers.GroupNorm(2, 4), layers.Upsample(4)
        self.attention, self.cross = AttentionBlock(4, 2, groups=2), CrossAttention(4, 6, 2, 2)
        self.linear = layers.Linear(4, 2, "silu")
        layers.name_and_initialise(self, 0)

    def construct(self, x, context):
        x = self.up(self.depthwise(layers.norm_conv(self.norm, self.conv, x)))
        x = self.attention(x).reshape(x.shape[0], 4, -1).transpose(0, 2, 1)
        return self.linear(self.cross(x, context).mean(1))


def in_torch(w, x, context):
    """The same network of weights by name."""
    from torch.nn import functional as F

    def heads(x):  # (B, N, 4) -> (B, 2, N, 2)
        return x.unflatten(-1, (2, 2)).transpose(1, 2)

    def layer(x, name):
        return x @ w[f"{name}.weight"].flatten(1).T + w.get(f"{name}.bias", 0)

    x = F.group_norm(x, 2, w["norm.weight"], w["norm.bias"])
    x = F.conv2d(x, w["conv.weight"], w["conv.bias"], padding=1)
    x = F.conv2d(x, w["depthwise.weight"], w["depthwise.bias"], padding=1, groups=4)
    x = F.conv_transpose2d(x, w["up.weight"], w["up.bias"], stride=2, padding=1)
    h = F.group_norm(x, 2, w["attention.norm.weight"], w["attention.norm.bias"]).flatten(2).transpose(1, 2)
    q, k, v = layer(h, "attention.qkv").unflatten(-1, (2, 3, 2)).permute(3, 0, 2, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x.flatten(2).transpose(1, 2) + layer(h, "attention.proj_out")
    q, k, v = (heads(layer(of, f"cross.to_{n}")) for of, n in ((x, "q"), (context, "k"), (context, "v")))
    x = layer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), "cross.to_out.0")
    return layer(F.silu(x.mean(1)), "linear")


@pytest.mark.parametrize(("targets", "size", "with_kernels"), [("all", 13, True), ("attention", 1, False)])
def test_outputs_and_gradients_equal_pytorch(targets, size, with_kernels, monkeypatch):
    torch = pytest.importorskip("torch")
    if not with_kernels:
        monkeypatch.setattr(kernels, "available", lambda: False)
    net, rng = Net(), np.random.default_rng(size)
    low_rank = LowRank(net, RANK, targets, 0, whole=("norm.bias",))
    named = {p.name: p for p in low_rank.adapters}
    chosen = {name.removesuffix(".lora_A.weight") for name in named if "lora_A" in name}
    attention = {"attention.qkv", "attention.proj_out", "cross.to_q", "cross.to_k", "cross.to_v", "cross.to_out.0"}
    assert chosen == (attention if targets == "attention" else attention | {"conv", "depthwise", "up", "linear"})
    assert [p.name for p in net.trainable_params()] == ["norm.bias"]
    for p in low_rank.adapters:
        p.set_data(Tensor(rng.standard_normal(p.shape, np.float32) / 2))

    x, context = rng.standard_normal((size, 4, 4, 4), np.float32), rng.standard_normal((size, 3, 6), np.float32)
    trained = [*low_rank.adapters, net.norm.bias]

    def loss_fn(x, context):
        y = net(x, context)
        return ops.square(y).sum(), y

    gradient = compiled(ms.value_and_grad(loss_fn, None, ms.ParameterTuple(trained), has_aux=True))
    (_, y), gradients = gradient(Tensor(x), Tensor(context))

    w = {p.name: torch.tensor(p.asnumpy(), dtype=torch.float64) for p in [*net.get_parameters(), *low_rank.adapters]}
    leaves = [w[p.name].requires_grad_() for p in trained]
    for path in chosen:
        a, b = w[f"{path}.lora_A.weight"], w[f"{path}.lora_B.weight"]
        w[f"{path}.weight"] = w[f"{path}.weight"] + (b.flatten(1) @ a.flatten(1)).reshape(w[f"{path}.weight"].shape)
    expected = in_torch(w, torch.tensor(x).double(), torch.tensor(context).double())
    expected.square().sum().backward()
    np.testing.assert_allclose(y.asnumpy(), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    for p, ours, leaf in zip(trained, gradients, leaves, strict=True):
        wanted = leaf.grad.numpy()
        np.testing.assert_allclose(ours.asnumpy(), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=p.name)

    compiled(low_rank.make_merge())()
    for path in chosen:
        merged, wanted = net.parameters_dict()[f"{path}.weight"].asnumpy(), w[f"{path}.weight"].detach()
        np.testing.assert_allclose(merged, wanted, atol=1e-6)


# Runs

BASE = override(SMALL, total_steps=2, warmup_steps=0)
TUNED = override(BASE, total_steps=4, save_every=2, log_every=1, lora_rank=2, lora_targets="all", lr=0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of points whose averages are not its weights."""
    return untrained(tmp_path_factory.mktemp("base") / "run", BASE, 2, noise=0.1)


@pytest.mark.slow
def test_a_run_of_updates(base, tmp_path):
    """Begins as the averages of its base, bit for bit, changes the chosen weights alone, samples from both files, and ends,
    where it goes on from a checkpoint, as a run that was not stopped."""
    config, run, other = replace(TUNED, init_from=str(base)), tmp_path / "run", tmp_path / "other"
    train(config, run)
    old, start = weights(base, 2, "ema"), weights(run, 0)
    new, average, lora = (weights(run, 4, name) for name in ("model", "ema", "lora"))
    assert all((start[name] == old[name]).all() and (weights(run, 0, "ema")[name] == old[name]).all() for name in old)
    paths = [name.removesuffix(".lora_A.weight") for name in lora if "lora_A" in name]
    assert {name for name in old if (old[name] != new[name]).any()} == {f"{path}.weight" for path in paths}
    for path in paths:
        name, update = f"{path}.weight", lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
        np.testing.assert_allclose(new[name], old[name] + update, atol=1e-6)
        assert (average[name] != new[name]).any() and (average[name] != old[name]).any()
    for kind, arrays in (("ema", average), ("model", new)):
        assert all((p.asnumpy() == arrays[p.name]).all() for p in Run(run, kind).net.get_parameters())

    shutil.copytree(run, other)
    shutil.rmtree(checkpoint(other, 4))
    with pytest.raises(UserError, match="--train.lora-rank"):
        train(override(config, lora_rank=3), other)
    train(override(config, init_from="moved away"), other)
    assert_same_run(run, other, 4)
    for name in lora:
        np.testing.assert_array_equal(weights(other, 4, "lora")[name], lora[name])


def started(config, run):
    """A task before its first step, and the parameters of its checkpoint, by file."""
    task = config.task()
    task.start(run)
    return task, {name: {key: p.asnumpy() for key, p in file.items()} for name, file in task.checkpoint.files.items()}


def test_a_run_starts_from_the_averages_of_a_run_a_checkpoint_or_a_bundled_model(base, tmp_path, capsys):
    averages = weights(base, 2, "ema")
    for path in (base, checkpoint(base, 2)):
        _, files = started(replace(BASE, init_from=str(path)), tmp_path / "run")
        assert all((files[name][key] == averages[key]).all() for name in ("model", "ema") for key in averages)
    assert not capsys.readouterr().err
    started(override(BASE, init_from=str(base), objective="eps", num_timesteps=10), tmp_path / "run")
    assert "--diffusion.num-timesteps 12, --diffusion.objective v" in capsys.readouterr().err
    bundled = safetensors.numpy.load_file(WEIGHTS / "fashion-mnist-large" / "ema.safetensors")
    config = override(PRESETS["fashion-mnist-large"], init_from="fashion-mnist-large", **{"data.name": "fashion-mnist-mini"})
    _, files = started(config, tmp_path / "run")
    assert all((files["model"][key] == bundled[key]).all() for key in bundled)


CLASSES = replace(PIXELS, model=replace(UNET, num_classes=10))


@pytest.mark.parametrize("rank", [0, 2])
def test_other_classes(tmp_path, rank):
    """Their embeddings alone are new; with updates they are trained whole, also when the run goes on."""
    base = untrained(tmp_path / "base", CLASSES, noise=0.1)
    config = override(CLASSES, init_from=str(base), **{"model.num_classes": 12}, lora_rank=rank)
    with pytest.raises(UserError, match="label_emb.weight"):
        started(config, tmp_path / "run")
    task, files = started(replace(config, init_partial=True), tmp_path / "run")
    old = weights(base, 0, "ema")
    assert [name for name in old if old[name].shape != files["model"][name].shape] == ["label_emb.weight"]
    assert all((files["model"][name] == old[name]).all() for name in old if name != "label_emb.weight")
    trained = [p.name for p in task.optimizer.parameters]
    if not rank:
        assert set(trained) == set(old)
        return
    updates = [name for name in trained if "lora" in name]
    assert trained == ["label_emb.weight", *updates] and all("attn" in name or "fn.fn.to_" in name for name in updates)
    task.checkpoint.save(1, **task.checkpoint_record())
    again, _ = started(replace(config, init_partial=True), tmp_path / "run")
    assert [p.name for p in again.optimizer.parameters] == trained


def test_new_captions_are_told_in_the_tokens_that_the_network_knows(tmp_path):
    config = replace(PIXELS, model=replace(UNET, vocab_size=300, max_length=4))
    old = Captions([["a red heart"], ["a blue flag"]], BytePairs.train(["a red heart", "a blue flag"], 300, 4))
    base = untrained(tmp_path / "base", config)
    keep(base, old)
    new = ImageSet(np.zeros((20, 28, 28, 1), np.uint8), np.zeros(20, np.int32), None, (("grün",),), np.zeros(20, np.int32))
    for path in (base, checkpoint(base, 0) / "model.safetensors"):
        task = override(config, init_from=str(path), batch_size=4).task(new)
        task.start(tmp_path / "run")
        np.testing.assert_array_equal(task.labelling.encoded, old.tokenizer.encode(["grün"]))
        assert task.labelling.tokenizer.to_record() == old.tokenizer.to_record()


def test_bad_input_is_one_line(base, tmp_path):
    points = f"train --preset scurve --run-dir {tmp_path / 'run'} --train.lora-rank 2".split()
    assert_refused(call(*points), "--train.lora-rank", "--init-from")
    model = "--model.dim 8 --model.depth 1 --diffusion.num-timesteps 12 --data.num 200 --train.sample-steps 2".split()
    code, _, err = call(*points, *model, "--init-from", base)
    assert code == 2 and "--train.lora-targets all" in err.splitlines()[-1]
    for path in (tmp_path, tmp_path / "nothing"):
        assert_refused(call(*points, *model, "--init-from", path), str(path))
    (tmp_path / "checkpoints").mkdir()
    assert_refused(call(*points, *model, "--init-from", tmp_path), "holds no checkpoint")
    assert_refused(call(*points, "--init-from", base), "init-partial")  # another width
    assert_refused(call(*points, "--init-from", base, "--train.lora-targets", "some"), "attention")


# Fine-tuning on 20 pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder of 20 pictures of another size."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_the_command_on_20_pictures(pictures, tmp_path):
    base, run = untrained(tmp_path / "base", PIXELS, 3, noise=0.1), tmp_path / "run"
    flags = "--preset quick --model.dim 8 --model.init-dim 8 --model.dim-mults 1 --model.resnet-block-groups 4"
    flags += " --train.total-steps 2 --train.batch-size 13 --train.sample-num 4 --train.sample-steps 2 --train.lora-rank 8"
    data = ["--data.name", "image-folder", "--data.dir", pictures]
    out = succeed("train", *flags.split(), "--run-dir", run, "--init-from", base, *data)
    assert "low-rank updates of 4 weights" in out
    changed = {name for name, old in weights(base, 3, "ema").items() if (weights(run, 2)[name] != old).any()}
    assert len(changed) == 4 and all("to_" in name for name in changed)
    succeed("sample", run, "--num", 4, "--steps", 2, "--out", tmp_path / "x.png")
    assert "finished" in succeed("train", *flags.split(), "--run-dir", run, "--init-from", base, *data)


@pytest.mark.slow
def test_a_run_of_latents_takes_first_stage_and_scale_with_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, old, run = untrained(tmp_path / "first", AUTOENCODER), tmp_path / "old", tmp_path / "run"
    resolve_first_stage(replace(TEXT, first_stage=str(first)), old)
    untrained(old, TEXT, 4, noise=0.1, latent_scale=0.7)
    shutil.rmtree(first)
    config = override(TEXT, init_from=str(old), lora_rank=2, total_steps=1)
    assert train(config, run).task.first_stage.scale == 0.7
    before, after = weights(old, 4, "ema"), weights(run, 1)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if ".attn" in name and name.endswith("weight")}
    shutil.rmtree(old)
    task, files = started(config, run)
    assert task.first_stage.scale == 0.7 and all((files["model"][name] == after[name]).all() for name in after)


# Export


def test_updates_under_the_names_of_diffusers(tmp_path):
    """W of the run that this one began from, in diffusers' files, plus B A by diffusers' names, is W of this run."""
    stage, home = untrained(tmp_path / "first", AUTOENCODER), tmp_path / "run"
    config = override(LATENT, init_from="gone", lora_rank=2, lora_targets="all")
    resolve_first_stage(replace(config, first_stage=str(stage)), home)
    untrained(home, config, 0, latent_scale=0.7)
    before = diffusers_models(Run(home))["unet"][1]
    net, rng = config.task().build()[0], np.random.default_rng(0)
    low_rank = LowRank(net, 2, "all", 0)
    for p in low_rank.adapters:
        p.set_data(Tensor(rng.standard_normal(p.shape, np.float32)))
    low_rank.make_merge()()
    Checkpoint(home, net, ema=EMA(net), extra_files={"lora": low_rank.adapters}).save(1, latent_scale=0.7)
    after = diffusers_models(Run(home))["unet"][1]
    succeed("export", home, "--format", "lora", "--out", tmp_path / "lora.safetensors")
    lora = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    paths = {name.partition(".lora_")[0] for name in lora}
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0" in paths
    for path in paths:
        a, b = (lora[f"{path}.lora_{x}.weight"] for x in "AB")
        name = f"{path.removeprefix('unet.')}.weight"
        update = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(before[name].shape)
        np.testing.assert_allclose(after[name], before[name] + update, atol=1e-5)
    assert len(paths) > 30 and {f"{path.removeprefix('unet.')}.weight" for path in paths} == {
        name for name in before if (before[name] != after[name]).any()
    }
    assert_refused(call("export", stage, "--format", "lora"), "--train.lora-rank")
