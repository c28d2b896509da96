"""The tests run on the CPU, or on the card that ``--device`` names, with every warning an error; ``--slow`` adds those that
are marked ``slow``."""

import contextlib
import ctypes
import gc
import os

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a core each: MindSpore's waiting threads would take the other's
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from ms_diffusion import runtime  # noqa: E402  # sizes its thread pools by the cores

runtime.catch_interrupts = lambda: None  # tests train in this process, and Ctrl-C is pytest's


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
    parser.addoption("--device", default="cpu", help="device of the tests: ascend, gpu or cpu")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("filterwarnings", "error")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # This imports MindSpore, which the process that only waits for the workers can spare
        runtime.set_device(config.getoption("device"))


LONGEST = (
    "test_dry_run test_latent_runs test_train_command test_evaluate_command test_api test_unet".split()
)  # first, to share them out


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.stem) in LONGEST else len(LONGEST))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


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
