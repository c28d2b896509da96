"""The training step against float64 NumPy and PyTorch, its learning rate, its average, its loss scale, its compilation."""

import math
import signal
import threading

import numpy as np
import pytest
from helpers import Linear
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from ms_diffusion import kernels
from ms_diffusion.models import layers
from ms_diffusion.models.mlp import ResidualMLPConfig
from ms_diffusion.process import DiffusionConfig
from ms_diffusion.runtime import compiled
from ms_diffusion.training.pack import Pack
from ms_diffusion.training.step import EMA, WarmupCosine, make_optimizer, make_train_step

LR, WARMUP, STEPS, CLIP, DECAY = 0.05, 2, 6, 1.0, 0.3  # the warm-up of the decay, (1 + n) / (10 + n), passes 0.3 at step 3


def squared_error(net):
    def loss_fn(x, y):
        return ops.square(net(x) - y).mean()

    return loss_fn


def batches(steps=STEPS):
    rng = np.random.default_rng(1)
    return [
        (rng.standard_normal((4, 3), dtype=np.float32), rng.standard_normal((4, 2), dtype=np.float32)) for _ in range(steps)
    ]


def values(parameters):
    return [p.asnumpy().copy() for p in parameters]


def learning_rate(step, lr=LR, warmup=WARMUP, total=STEPS):
    progress = np.clip((step - warmup) / (total - warmup), 0, 1)
    return lr * min((step + 1) / (warmup + 1), 1) * 0.5 * (1 + np.cos(np.pi * progress))


def reference(parameters, data, clip=CLIP, decay=DECAY, rate=learning_rate):
    """Losses, gradient norms, parameters and averages after the steps, in float64."""
    p = [np.asarray(value, np.float64) for value in parameters]
    ema, m, v = [q.copy() for q in p], [0.0, 0.0], [0.0, 0.0]
    losses, norms = [], []
    for n, (x, y) in enumerate(data, 1):
        x, y = x.astype(np.float64), y.astype(np.float64)
        error = x @ p[0] + p[1] - y
        d = 2 * error / error.size
        g = [x.T @ d, d.sum(0)]
        losses.append((error**2).mean())
        norms.append(np.sqrt(sum((a**2).sum() for a in g)))
        g = [a * min(clip / (norms[-1] + 1e-6), 1) for a in g]
        lr = rate(n - 1) * np.sqrt(1 - 0.999**n) / (1 - 0.9**n)
        mix = min(decay, (1 + n) / (10 + n))
        for i in range(2):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            p[i] = p[i] - lr * m[i] / (np.sqrt(v[i]) + 1e-8)
            ema[i] = mix * ema[i] + (1 - mix) * p[i]
    return losses, norms, p, ema


def make(clip=CLIP, decay=DECAY, scaler=None, net=None):
    net = net or Linear()
    ema = EMA(net, decay)
    optimizer = make_optimizer(net, LR, WARMUP, STEPS)
    return net, ema, optimizer, make_train_step(squared_error(net), optimizer, ema, clip_norm=clip, loss_scaler=scaler)


def run(step, data):
    return np.array([[float(out.asnumpy()) for out in step(Tensor(x), Tensor(y))] for x, y in data]).T  # losses, norms


# The step


@pytest.mark.parametrize("clip", [0.5, 1e3])  # always active, never active
def test_steps_equal_the_numpy_reference(clip):
    net, ema, optimizer, step = make(clip)
    losses, norms, p, averages = reference(values(optimizer.parameters), batches(), clip)
    assert (min(norms) > clip) if clip < 1 else (max(norms) < clip)

    found_losses, found_norms = run(step, batches())

    np.testing.assert_allclose(found_losses, losses, rtol=2e-5)
    np.testing.assert_allclose(found_norms, norms, rtol=2e-5)
    for found, wanted in zip(values(net.get_parameters()) + values(ema.net.get_parameters()), p + averages, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert int(optimizer.global_step.asnumpy().item()) == STEPS


def test_steps_equal_pytorch():
    torch = pytest.importorskip("torch")
    net, _, optimizer, step = make()
    weight, bias = (torch.tensor(v, requires_grad=True) for v in values(optimizer.parameters))
    adam = torch.optim.Adam([weight, bias], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, learning_rate)
    losses = []
    for x, y in batches():
        loss = torch.square(torch.from_numpy(x) @ weight + bias - torch.from_numpy(y)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight, bias], CLIP)
        adam.step()
        schedule.step()
        losses.append(loss.item())

    np.testing.assert_allclose(run(step, batches())[0], losses, rtol=1e-4)
    for found, wanted in zip(values(net.get_parameters()), (weight, bias), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["kernels", "operators", "packed"])
def test_weight_decay_is_that_of_pytorch(how, monkeypatch):
    """AdamW, with the biases in a group without decay. A step that is skipped decays nothing."""
    torch = pytest.importorskip("torch")
    if how == "operators":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif how == "kernels" and not kernels.available():
        pytest.skip("needs a C++ compiler")
    net = nn.SequentialCell(layers.Linear(3, 5), layers.Linear(5, 2, "silu"))
    layers.name_and_initialise(net, seed=0)
    optimizer = make_optimizer(net, LR, WARMUP, STEPS)
    peer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 2))
    with torch.no_grad():
        for p, value in zip(peer.parameters(), values(optimizer.parameters), strict=True):
            p.copy_(torch.from_numpy(value))
    decayed, others = ([p for p in peer.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.7}, {"params": others, "weight_decay": 0.0}], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, learning_rate)
    pack = Pack(net, optimizer) if how == "packed" else None
    step = make_train_step(squared_error(net), optimizer, EMA(net, DECAY), weight_decay=0.7, pack=pack, clip_norm=CLIP)
    for i, (x, y) in enumerate(batches()):
        loss = torch.square(peer(torch.from_numpy(x)) - torch.from_numpy(y)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), CLIP)
        adam.step()
        schedule.step()
        assert float(step(x, y)[0]) == pytest.approx(loss.item(), rel=1e-4)
        if i == 2:
            assert math.isnan(float(step(x, y * np.float32("nan"))[0]))
    if pack:
        assert pack.count == 4
        pack.write_back()
    for found, wanted in zip(values(optimizer.parameters), peer.parameters(), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


# Batches


def test_fields_by_name_and_by_default():
    """By position or by name, in any order; absent ones have loss_fn's default, and each set of fields its gradient."""
    net, (x, y) = Linear(), batches(1)[0]
    optimizer = make_optimizer(net, LR, WARMUP, STEPS)

    def loss_fn(x, y, weights=None, shift=None):
        error = ops.square(net(x) - y) if shift is None else ops.square(net(x) + shift - y)
        return error.mean() if weights is None else (weights * error).mean()

    step = make_train_step(loss_fn, optimizer, clip_norm=1e9)
    weights, shift = np.float32([[3.0], [0.0], [1.0], [0.5]]), np.float32([[0.5, -2]])
    for by_position, by_name in (
        (("x", "y"), ()),
        (("x",), ("y",)),
        ((), ("weights", "y", "x")),
        (("x", "y"), ("shift",)),
        (("x", "y", "weights", "shift"), ()),
    ):
        arrays = {"x": x, "y": y, "weights": weights, "shift": shift}
        w, bias = (p.asnumpy().astype(np.float64) for p in optimizer.parameters)
        loss, norm = step(*(Tensor(arrays[n]) for n in by_position), **{n: Tensor(arrays[n]) for n in by_name})
        error = x @ w + bias + ("shift" in by_position + by_name) * shift - y
        d = 2 * (weights if "weights" in by_position + by_name else 1) * error / error.size
        assert float(loss) == pytest.approx((d * error / 2).sum(), rel=1e-4)
        assert float(norm) == pytest.approx(math.sqrt(((x.T @ d) ** 2).sum() + (d.sum(0) ** 2).sum()), rel=1e-4)
    for names in ("x", "x y labels"):
        with pytest.raises(TypeError, match="'y'|'labels'"):
            step(**{name: Tensor(x) for name in names.split()})


def test_fields_of_several_steps_by_name():
    """With a first axis; an absent field is absent in each step."""
    net, (x, y) = Linear(), (np.stack(column) for column in zip(*batches(2), strict=True))

    def loss_fn(x, weights=None, y=None):
        return ops.square(net(x) - y).mean() if weights is None else 0 * net(x).sum()

    optimizer = make_optimizer(net, LR, WARMUP, STEPS)
    losses, norms, _, _ = reference(values(optimizer.parameters), batches(2))
    with pytest.raises(ValueError, match="set it to 1"):
        make_train_step(loss_fn, optimizer, steps_per_call=2, has_aux=True)
    found, norm = make_train_step(loss_fn, optimizer, steps_per_call=2)(x=Tensor(x), y=Tensor(y))
    assert [*found.asnumpy(), float(norm)] == pytest.approx([*losses, norms[1]], rel=1e-4)


# Steps in one call


def noised_mlp():
    """(network, loss function, six batches): a ResidualMLP that learns points, with float and integer arrays in a batch."""
    net, diffusion = (
        ResidualMLPConfig(8, 1, 1, num_embeddings=100).build(),
        DiffusionConfig(100, "sigmoid", loss="l2").build(),
    )

    def loss_fn(x_start, t, noise):
        return diffusion.p_losses(net, x_start, t, noise)

    rng = np.random.default_rng(2)
    floats = rng.standard_normal((2, STEPS, 13, 2), dtype=np.float32)
    return net, loss_fn, list(zip(floats[0], rng.integers(0, 100, (STEPS, 13)).astype(np.int32), floats[1], strict=True))


def small_linear():
    net = Linear()
    return net, squared_error(net), batches()


@pytest.mark.parametrize(
    ("build", "averaged", "with_kernels"),
    [(noised_mlp, True, True), (small_linear, True, False), (small_linear, False, True)],
)
def test_steps_in_one_call_are_those_of_many(build, averaged, with_kernels, monkeypatch):
    """2 calls of 3 steps against 6 of one: bit for bit in all that a step changes."""
    if not with_kernels:
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("needs a C++ compiler")

    def trained(steps_per_call):
        net, loss_fn, data = build()
        ema, optimizer = EMA(net, DECAY) if averaged else None, make_optimizer(net, LR, WARMUP, STEPS + 1)
        step = make_train_step(loss_fn, optimizer, ema, clip_norm=0.5, steps_per_call=steps_per_call)
        losses, norms, states = [], [], []
        for i in range(0, STEPS, steps_per_call):
            batch = [np.stack(column) for column in zip(*data[i : i + steps_per_call], strict=True)]
            loss, norm = step(*[Tensor(column if steps_per_call > 1 else column[0]) for column in batch])
            losses.extend(np.atleast_1d(loss.asnumpy()))
            norms.append(float(norm))
            state = [*optimizer.parameters, *optimizer.moment1, *optimizer.moment2, *(ema.averages if averaged else ())]
            states.append(values([*state, optimizer.global_step, optimizer.beta1_power, optimizer.beta2_power]))
        return losses, norms, states

    losses, norms, after_each = trained(1)
    assert len(set(losses)) == len(set(norms)) == STEPS and max(norms) > 0.5
    found, last_norms, states = trained(3)
    np.testing.assert_array_equal(found, losses)
    np.testing.assert_array_equal(last_norms, norms[2::3])
    np.testing.assert_equal(states, after_each[2::3])


@pytest.mark.parametrize("frozen", [False, True])
def test_averages_are_of_the_network_alone(frozen, monkeypatch):
    """Also with a trained parameter that is none of the network's, and with parameters that are not trained: as without the
    kernels."""
    if not kernels.available():
        pytest.skip("needs a C++ compiler")

    def trained():
        net, extra = Linear(), Parameter(Tensor(np.zeros(1000, np.float32)), name="extra")
        next(iter(net.get_parameters())).requires_grad = not frozen
        error = squared_error(net)

        def loss_fn(x, y):
            return error(x, y) * ops.exp(-extra.mean()) + extra.mean()

        ema = EMA(net, DECAY)
        optimizer = make_optimizer(net, LR, WARMUP, STEPS, extra_parameters=[extra])
        step = make_train_step(loss_fn, optimizer, ema)
        losses = [step(*batch)[0] for batch in batches()]
        return [loss.asnumpy() for loss in losses], values([extra, *net.get_parameters(), *ema.averages])  # read late

    with_kernels = trained()
    monkeypatch.setattr(kernels, "available", lambda: False)
    for found, expected in zip(with_kernels, trained(), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_learning_rate():
    schedule = WarmupCosine(1e-3, 4, 12)
    steps = [0, 1, 3, 4, 8, 10, 12, 13, 1000]
    half = 0.5 * (1 + np.cos(np.pi * 0.75))
    wanted = np.array([0.2, 0.4, 0.8, 1, 0.5, half, 0, 0, 0]) * 1e-3
    found = [float(schedule(Tensor(s, ms.int32)).asnumpy()) for s in steps]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-10)


def test_learning_rate_without_warm_up():
    found = [float(WarmupCosine(2.0, 0, 2)(Tensor(s, ms.int32)).asnumpy()) for s in range(4)]
    np.testing.assert_allclose(found, [2, 1, 0, 0], atol=1e-6)


@settings(deadline=None, max_examples=8)
@given(st.floats(1e-6, 1), st.integers(0, 500), st.integers(1, 2000))
def test_learning_rate_is_its_closed_form_with_decay_and_constant_without(lr, warmup, after):
    """Without, it is lr at every step after the warm-up, also beyond the last."""
    total = warmup + after
    steps = np.clip([0, 1, warmup - 1, warmup, warmup + 1, total // 2, total - 1, total, total + 1, 10 * total], 0, None)
    decayed, constant = (
        WarmupCosine(lr, warmup, total, **options)(Tensor(steps.astype(np.int32))).asnumpy() / lr
        for options in ({}, {"decay": False})
    )
    closed = [learning_rate(step, 1, warmup, total) for step in steps]
    np.testing.assert_allclose(decayed, closed, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(constant, np.minimum((steps + 1) / (warmup + 1), 1), rtol=1e-5)
    np.testing.assert_allclose(constant[steps >= warmup], 1, rtol=1e-6)
    np.testing.assert_array_equal(decayed, WarmupCosine(lr, warmup, total, decay=True)(Tensor(steps)).asnumpy() / lr)


def test_steps_at_a_constant_rate_and_without_average_equal_the_numpy_reference():
    net = Linear()
    optimizer = make_optimizer(net, LR, WARMUP, 1, decay=False)
    _, _, wanted, _ = reference(
        values(optimizer.parameters), batches(), rate=lambda step: LR * min((step + 1) / (WARMUP + 1), 1)
    )
    run(make_train_step(squared_error(net), optimizer, clip_norm=CLIP), batches())
    for found, value in zip(values(optimizer.parameters), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-6)


# The average


def test_average_is_a_copy_of_its_own():
    net = Linear()
    ema = EMA(net)
    assert [p.name for p in ema.net.get_parameters()] == ["ema.weight", "ema.bias"]
    assert [p.name for p in net.get_parameters()] == ["weight", "bias"]
    assert not ema.net.trainable_params() and len(net.trainable_params()) == 2
    before = values(ema.averages)
    ops.assign(net.weight, Tensor(np.zeros((3, 2), np.float32)))
    np.testing.assert_array_equal(ema.net.weight.asnumpy(), before[0])
    ops.assign(ema.net.bias, Tensor(np.ones(2, np.float32)))
    np.testing.assert_array_equal(net.bias.asnumpy(), before[1])


def test_a_graph_compiled_over_the_average_before_training_sees_it_move():
    net, ema, _, step = make()
    x = batches()[0][0]

    def predict(x):
        return ema.net(x)

    graph = compiled(predict)
    before = graph(Tensor(x)).asnumpy()
    run(step, batches())
    weight, bias = values(ema.net.get_parameters())
    after = graph(Tensor(x)).asnumpy()
    np.testing.assert_allclose(after, x @ weight + bias, rtol=1e-5, atol=1e-6)
    assert np.abs(after - before).max() > 0.01


# float16


class Half(Linear):
    def construct(self, x):
        y = ops.matmul(ops.cast(x, ms.float16), ops.cast(self.weight, ms.float16))
        return ops.cast(y, ms.float32) + self.bias


def test_an_overflow_skips_the_step_and_halves_the_scale():
    scaler = ms.amp.DynamicLossScaler(scale_value=2.0**10, scale_factor=2, scale_window=2)
    net, ema, optimizer, step = make(scaler=scaler, net=Half())
    start = values(optimizer.parameters)
    x, y = batches()[0]

    loss, norm = step(Tensor(x), Tensor(y + 1e4))  # the gradient, about 5e3 x 2^10, is beyond float16's 65504
    assert np.isnan(loss.asnumpy()) and not np.isfinite(norm.asnumpy())
    assert scaler.scale_value.asnumpy() == 2.0**9
    assert optimizer.global_step.asnumpy() == 0
    assert not any(m.asnumpy().any() for m in [*optimizer.moment1, *optimizer.moment2])
    for found, wanted in zip(values(net.get_parameters()) + values(ema.averages), start + start, strict=True):
        np.testing.assert_array_equal(found, wanted)

    losses, norms, p, averages = reference(start, batches())
    found_losses, found_norms = run(step, batches())  # and it goes on as if nothing had been
    np.testing.assert_allclose(found_losses, losses, rtol=5e-3)
    np.testing.assert_allclose(found_norms, norms, rtol=1e-2)
    for found, wanted in zip(values(net.get_parameters()) + values(ema.averages), p + averages, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-3)
    assert optimizer.global_step.asnumpy() == STEPS
    assert scaler.scale_value.asnumpy() == 2.0 ** (9 + STEPS // 2)  # doubled after every 2 good steps


def test_the_loss_scale_changes_nothing_else():
    _, ema, optimizer, step = make(scaler=ms.amp.DynamicLossScaler(scale_value=2.0**10, scale_factor=2, scale_window=100))
    losses, norms, _, averages = reference(values(optimizer.parameters), batches())
    np.testing.assert_allclose(run(step, batches()), [losses, norms], rtol=2e-5)
    for found, wanted in zip(values(ema.averages), averages, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


# runtime.compiled, which on the CPU waits for an event that the graph sets: nothing may leave it waiting


@pytest.fixture
def no_hang(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where a failing compilation leaves rank_0/

    def too_long(*_):
        raise TimeoutError("compiled() waits for ever")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def single(x, y):
    return ops.tanh(x) * y + 1


def pair(x, y):
    return ops.matmul(x, y), x.sum()


def nested(x, y):
    return (x + y, (x * y, y.sum()))


def constant(x, y):
    return ops.ones((2, 2), ms.float32)


def same(x, y):
    return x


def flat(out):
    return [v for o in out for v in flat(o)] if isinstance(out, tuple) else [out.asnumpy()]


@pytest.mark.parametrize("fn", [single, pair, nested, constant, same])
def test_compiled_equals_jit_and_pynative(fn, no_hang):
    graph, jit = compiled(fn), ms.jit(fn)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        args = [Tensor(rng.standard_normal((2, 2), dtype=np.float32)) for _ in range(2)]
        found, wanted = flat(graph(*args)), flat(fn(*args))
        assert len(found) == len(wanted)
        for a, b, c in zip(found, flat(jit(*args)), wanted, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-6)


def test_compiled_sleeps_until_the_graph_reports_its_end(no_hang, monkeypatch):
    log = []

    class Event(threading.Event):
        def clear(self):
            log.append("clear")
            super().clear()

        def set(self):
            log.append("set")
            super().set()

        def wait(self, timeout=None):
            super().wait(timeout)
            log.append("woken")

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Event", Event)
        graph = compiled(single)
    x = Tensor(np.ones((2, 2), np.float32))
    for _ in range(3):
        graph(x, x)
    assert log == ["clear", "set", "woken"] * 3


def test_compiled_follows_a_new_shape(no_hang):
    graph = compiled(single)
    for n in (1, 13, 1):
        x = np.full((n, 2), 0.5, np.float32)
        np.testing.assert_allclose(graph(Tensor(x), Tensor(x)).asnumpy(), np.tanh(x) * x + 1, rtol=1e-6)


def test_compiled_functions_interleaved(no_hang):
    def square(x):
        return x * x

    def twice(x):
        return x + x, x.sum()

    def minus(x):
        return -x

    graphs = [compiled(square), compiled(twice), compiled(minus)]
    for k in range(20):
        x = np.full(3, k, np.float32)
        results = [graph(Tensor(x)) for graph in graphs]  # none is read before all have run
        np.testing.assert_array_equal(results[0].asnumpy(), x * x)
        np.testing.assert_array_equal(results[1][0].asnumpy(), x + x)
        np.testing.assert_array_equal(results[2].asnumpy(), -x)
    np.testing.assert_array_equal(graphs[2](graphs[0](Tensor(x))).asnumpy(), -x * x)


def test_compiled_raises_what_the_function_raises(no_hang):
    def picky(x):
        if x.shape[0] == 4:
            raise ValueError("not four")
        return x * 2

    def mismatched(x):
        return ops.matmul(x, ops.ones((3, 3), ms.float32))

    graph = compiled(picky)
    for _ in range(2):
        with pytest.raises(ValueError, match="not four"):
            graph(Tensor(np.zeros(4, np.float32)))
        np.testing.assert_array_equal(graph(Tensor(np.ones(2, np.float32))).asnumpy(), [2, 2])  # and works afterwards
    with pytest.raises((RuntimeError, ValueError)):
        compiled(mismatched)(Tensor(np.zeros((2, 2), np.float32)))


def test_compiled_raises_what_a_kernel_raises(no_hang):
    def pick(x, i):
        return ops.gather(x, i, 0)

    graph = compiled(pick)
    x = Tensor(np.arange(4, dtype=np.float32))
    assert graph(x, Tensor(2, ms.int32)).asnumpy() == 2
    with pytest.raises(RuntimeError, match="range"):
        graph(x, Tensor(100, ms.int32)).asnumpy()
