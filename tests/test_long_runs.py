"""Graphs are shared, and freed with their owner; the memory of a long run does not grow (`python -m tests.long_runs`)."""

import copy
import gc
import weakref

import long_runs
import numpy as np
import pytest

from mindspore import Parameter, Tensor, nn

import ms_diffusion as md
from ms_diffusion import denoiser, images, runtime


class Scaled(nn.Cell):
    """A network that predicts w x_t."""

    def __init__(self, w):
        super().__init__()
        self.w = Parameter(Tensor(np.float32(w)), name="w")

    def construct(self, x, t):
        return self.w * x


def graphs():
    return len(runtime.graph_api().ms_compile_cache)


def twice(x):
    return 2 * x


def compile_one():
    runtime.compiled(twice)(Tensor(np.zeros(3, np.float32)))


def test_graphs_go_with_their_function():
    compile_one()
    before = graphs()

    def use():
        net = Scaled(2.0)

        def double(x):
            return net(x, x)

        assert runtime.compiled(double)(Tensor(np.ones(3, np.float32))).asnumpy().tolist() == [2, 2, 2]
        assert graphs() == before  # one came, and that of compile_one went
        return weakref.ref(net)

    net = use()
    gc.collect()
    compile_one()
    gc.collect()
    assert net() is None and graphs() == before


def test_a_function_of_many_shapes_has_few_graphs():
    double = runtime.compiled(twice)
    before = graphs()
    for n in [*range(1, 20), 1, 19]:  # 1 once more, after its graph has gone
        assert double(Tensor(np.ones(n, np.float32))).asnumpy().tolist() == [2] * n
    assert graphs() == before + runtime.MOST_GRAPHS


DIFFUSION = md.GaussianDiffusion(np.linspace(1e-4, 0.5, 20), objective="x0")


def drawn(net, diffusion=DIFFUSION, **options):
    return md.sample(net, diffusion, (1, 2, 2), 4, steps=1, **options)


def test_calls_with_one_network_share_its_graphs():
    net = Scaled(0.1)
    first, count = drawn(net), graphs()
    for seed in range(4):
        drawn(net, seed=seed, sampler="ddpm")
    assert graphs() == count
    np.testing.assert_array_equal(drawn(net), first)
    net.w.set_data(Tensor(np.float32(0.05)))  # the weights are those of the network now
    np.testing.assert_allclose(drawn(net), first / 2, rtol=1e-6)


def test_a_copy_of_a_network_has_its_own_graphs():
    net = Scaled(0.1)
    first = drawn(net)
    other = copy.deepcopy(net)
    other.w.set_data(Tensor(np.float32(0.05)))
    np.testing.assert_allclose(drawn(other), first / 2, rtol=1e-6)
    np.testing.assert_array_equal(drawn(net), first)


def test_another_process_is_not_taken_for_the_last_one():
    net = Scaled(0.1)
    plain, other = (md.GaussianDiffusion(np.linspace(1e-4, 0.5, 20), objective=each) for each in ("x0", "eps"))
    first = drawn(net, plain)
    assert np.abs(drawn(net, other) - first).max() > 0.1
    np.testing.assert_array_equal(drawn(net, plain), first)


def test_samplers_call_graphs_of_few_sizes():
    sizes = [denoiser.graph_size(n) for n in range(1, 65)]
    assert set(sizes) == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}
    assert all(n <= size < 1.5 * n for n, size in enumerate(sizes, 1))
    assert denoiser.graph_size(65) == 65 and denoiser.graph_size(10_000) == 10_000


def test_a_batch_is_filled_up_for_its_graph():
    class Shifted(Scaled):
        def construct(self, x, t, labels):
            return self.w * x + labels.reshape(-1, 1)

    denoise, x = denoiser.make_denoiser(DIFFUSION, Shifted(0.1)), np.random.default_rng(0).random((8, 3), np.float32)
    denoise(Tensor(x), 3, Tensor(np.arange(8, dtype=np.int32)))
    count = graphs()
    for n in (8, 7, 8):
        found = denoise(Tensor(x[:n]), 3, Tensor(np.arange(n, dtype=np.int32))).asnumpy()
        np.testing.assert_allclose(found, np.clip(0.1 * x[:n] + np.arange(n)[:, None], -1, 1), rtol=1e-6)
    assert graphs() == count


def test_a_long_curve_is_drawn_in_bounded_time(tmp_path):
    steps = np.arange(200_000)
    images.save_loss_curve(tmp_path / "loss.png", steps.tolist(), (1 / (1 + steps)).tolist())
    assert (tmp_path / "loss.png").stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name, size, limit", [("sample", 48, 0.02), ("networks", 60, 0.02), ("quick", 100, 0.02)])
def test_memory_and_handles_stay(name, size, limit, tmp_path):
    grown = long_runs.growth(long_runs.CASES[name](tmp_path, size), 0.3)
    assert grown["drift"] < limit
    assert max(grown[each] for each in ("threads", "children", "graphs")) <= 0, grown
    assert grown["handles"] <= 2, grown  # which MindSpore opens late; a leak would be one for each of some 10 checkpoints
