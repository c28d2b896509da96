"""The tests run on the CPU, with every warning an error; ``--slow`` adds those marked ``slow``."""

import contextlib
import copy
import ctypes
import gc

import pytest

from ms_diffusion import runtime

runtime.set_device("cpu")


@pytest.fixture(scope="module", autouse=True)
def free_memory(request):
    """Clear a module's own functools caches and free its graphs, which MindSpore keeps when their functions are gone."""
    yield
    import mindspore as ms

    for value in list(vars(request.module).values()):
        if getattr(value, "__module__", None) == request.module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
    ms.ms_memory_recycle()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("filterwarnings", "error")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="module")
def compiled_once():
    """sample.py loads each run's network once and keeps its graphs; nothing else of it changes by that."""
    import sample
    from ms_diffusion import sampling as generation

    load_run, make_denoiser, loaded, denoisers = sample.load_run, sample.make_denoiser, {}, {}

    def load(run, *which):
        if (run, which) not in loaded:
            loaded[run, which] = load_run(run, *which)
        net, diffusion, config, step = loaded[run, which]
        return net, copy.copy(diffusion), config, step

    def make(diffusion, net, clip=True):
        if (net, clip) not in denoisers:
            denoisers[net, clip] = make_denoiser(diffusion, net, clip=clip)
        return denoisers[net, clip]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "load_run", load)
        patch.setattr(sample, "make_denoiser", make)
        patch.setattr(generation, "make_denoiser", make)
        yield


@pytest.fixture(scope="session")
def class_run(tmp_path_factory):
    """A small run of images with classes, guidance and self-conditioning, loaded once: its graphs are shared."""
    from dataclasses import replace

    from runs import PIXELS, UNET, untrained

    from ms_diffusion.training.runs import Run

    diffusion = replace(PIXELS.diffusion, objective="eps", num_timesteps=20)
    model = replace(UNET, num_classes=10, self_condition=True)
    train = replace(PIXELS.train, sample_guidance=2.0, sample_guidance_interval=(10, 19))
    config = replace(PIXELS, model=model, diffusion=diffusion, train=train)
    return Run(untrained(tmp_path_factory.mktemp("class") / "run", config, step=6, noise=0.05))
