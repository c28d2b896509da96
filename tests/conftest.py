"""The tests run on the CPU, with every warning an error; ``--slow`` adds those marked ``slow``."""

import pytest

from ms_diffusion import runtime

runtime.set_device("cpu")
runtime.catch_interrupts = lambda: None  # tests train in this process, and Ctrl-C is pytest's


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
