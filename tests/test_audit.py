"""The audit: what is said of operators whose kernels are known, and the graphs of presets."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from ms_diffusion.commands import audit
from ms_diffusion.commands.audit import Graphs

# From a dry run of the training step of quick on Ascend910B2, with MindSpore 2.10: what was launched, and how
ACLNN = """Add BatchMatMul Cast ClampScalar Concat Cos Div Divs Erf Exp GroupNorm GroupNormGrad MatMul Mul Muls Neg
PowTensorScalar Reciprocal SiLU SiLUGrad Sin Softmax SoftmaxBackward SplitWithSize Sqrt Square Sub SumExt Tile Transpose"""
ACLOP = """Adam AddN Assign AssignAdd BiasAdd BiasAddGrad Conv2D Conv2DBackpropFilter Conv2DBackpropInput Conv2DTranspose
Gather RealDiv ReduceMean Split TensorMove"""


@pytest.mark.slow
def test_what_a_dry_run_has_launched():
    for way, names in {"aclnn": ACLNN, "aclop": ACLOP, "missing": "Einsum", "view": "Reshape ExpandDims"}.items():
        assert {name: audit.on_ascend(name) for name in names.split()} == dict.fromkeys(names.split(), way)


def test_documented_devices():
    assert audit.documented("Conv2D", "Ascend") == "kernel" and audit.documented("Roll", "CPU") == "missing"
    assert audit.documented("Einsum", "GPU") == "kernel" and audit.documented("Einsum", "Ascend") == "missing"
    assert audit.documented("BiasAddGrad", "Ascend") is None and audit.documented("Nonsense", "CPU") is None


def test_the_table_of_graphs(monkeypatch):
    """What the CPU has: left when kernels are chosen, replaced before, or named by the error of the compilation."""
    monkeypatch.setattr(audit, "on_ascend", lambda name: "aclnn")
    monkeypatch.setattr(audit, "is_named", lambda name, device: name == "Mulled")
    good = Graphs(Counter(Add=2, Muls=1, Mulled=1), {"Add", "Mulled"}, set())
    bad = Graphs(Counter(Add=1, Einsum=1, Cos=1), set(), {"Einsum"})
    rows = {name: ways[1:] for name, ways in audit.table([good, bad]).items()}
    assert rows == {
        "Add": ("kernel", "kernel"),
        "Muls": ("rewritten", "rewritten"),
        "Mulled": ("kernel", "kernel"),
        "Einsum": ("kernel", "missing"),
        "Cos": ("kernel", "kernel"),
    }


def test_counting_in_a_dumped_graph(tmp_path):
    (tmp_path / "x_validate_1.ir").write_text(
        "  %0(a) = PrimFunc_Add(%1, %2) primitive_attrs: {}\n  %3(b) = Conv2D(%0)\n  %4(c) = TupleGetItem(%3, I64(0))\n"
        '  %5(d) = Custom(%4) primitive_attrs: {func_name: "set_done"}\n  %6(e) = Custom(%4) primitive_attrs: {}\n# Mul(\n'
    )
    assert audit.count(tmp_path / "x_validate_1.ir") == Counter(Add=1, Conv2D=1, Custom=1)


EINSUM = """
import ms_diffusion.runtime as runtime
runtime.set_device("cpu")
import numpy as np, mindspore as ms
from mindspore import Tensor, ops
from ms_diffusion.commands import audit

@ms.jit
def bad(x):
    return ops.einsum("ij,jk->ik", x, ops.cos(x))

@ms.jit
def good(x):
    return ops.cos(x)

x = Tensor(np.ones((2, 2), np.float32))
with audit.dumped_graphs() as folder:
    tables = [audit.table([audit.compile_graphs(lambda: fn(x), folder)]) for fn in (bad, good)]
print(tables[0]["Einsum"], tables[1])
"""


@pytest.mark.slow
def test_a_graph_with_an_operator_that_ascend_and_cpu_lack(tmp_path):
    (tmp_path / "einsum.py").write_text(EINSUM)  # MindSpore compiles functions of files alone
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, tmp_path / "einsum.py"], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["('missing', 'kernel', 'missing') {'Cos': ('aclnn', 'kernel', 'kernel')}"], (
        done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["scurve", "scurve-flow", "quick-upscale", "autoencoder", "latent-text"])
def test_presets(preset):
    done = subprocess.run(
        [sys.executable, "-m", "ms_diffusion", "audit", "--preset", preset], capture_output=True, text=True
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:] if line and line.split()[1].isdigit()]
    assert done.returncode == 0 and {"Add", "Adam", "AddN"} <= {row[0] for row in rows}, done.stdout + done.stderr
    assert all(row[3:] and set(row[3:]) <= {"aclnn", "aclop", "kernel", "rewritten", "view", "unknown"} for row in rows)
