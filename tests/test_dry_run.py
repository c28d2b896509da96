"""Every preset compiled and launched for an Ascend or a GPU that is not there (dry_run/__init__.py), against what each may
cost a card in a step (dry_run/budgets.py); and that these checks can fail."""

import pytest

from tests.dry_run.budgets import GROUPS, key, load, measured, problems
from tests.dry_run.build import reason_to_skip
from tests.dry_run.run import SOCS, flaws

ASCEND = SOCS[0]


def skip_without(device):
    if reason := reason_to_skip(device):
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_presets_fit_the_card_and_their_budgets(group):
    card, cases = GROUPS[group]
    skip_without("gpu" if card == "gpu" else "ascend")
    records = measured(card, cases)
    assert len(records) == len(cases)
    budgets = load()[card]
    assert not [problem for record in records for problem in problems(record, budgets.get(key(record)))]
    spent = {(record["preset"], record["mode"]): record["launches"] for record in records}
    updates = [spent[preset, "train"] - found for (preset, mode), found in spent.items() if mode == "gradients"]
    assert all(0 < update < 80 for update in updates) and len(updates) == 2 * (
        group == "pixels"
    )  # for any number of tensors


@pytest.mark.slow
@pytest.mark.parametrize("card", [ASCEND, "gpu"])
def test_the_checks_can_fail(card):
    skip_without("gpu" if card == "gpu" else "ascend")
    names = ["good", "einsum", "pyfunc", "float64", "dynamic", "constant", "recompiled", "copying"]
    records = measured(card, [(f"control-{name}", "", "") for name in names])
    good, einsum, pyfunc, float64, dynamic, constant, recompiled, copying = records
    launches = good["launches"]
    assert launches == 2 and good["H2D"] == 1
    assert not problems(good, [launches, 1, good["synchronisations"]])
    assert len(problems(good, [launches - 1, 1, good["synchronisations"]])) == 1
    assert len(problems(good, [launches, 0, good["synchronisations"]])) == 1
    assert len(problems(good, [launches, 1, good["synchronisations"] - 1])) == 1
    assert len(problems(good, None)) == 1
    if card == ASCEND:  # a GPU has it
        assert "Einsum" in einsum["error"] and problems(einsum, None)
    many = [1000, 1000, 1000]
    assert pyfunc["host"] == ["Custom"] and problems(pyfunc, many)
    assert "Cos" in float64["float64"] and problems(float64, many)
    assert "NonZero" in dynamic["dynamic"] and problems(dynamic, many)
    assert constant["constant"] == ["Assign"] and problems(constant, many)
    assert recompiled["recompilations"] == 4 and problems(recompiled, many)
    assert (copying["H2D"], copying["D2H"]) == (1, 1)


GRAPH = """
  %0(CNode_1) = PrimFunc_Cos(%para1_x, F64(-1)) primitive_attrs: {visited: Bool(1)}
      : (<Tensor[Float32], (2, 2)>, <Float64, NoShape>) -> (<Tensor[Float32], (2, 2)>)
"""


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("host", "visited: Bool(1)", 'primitive_target: "CPU"'),
        ("float64", "Tensor[Float32]", "Tensor[Float64]"),
        ("half", "Tensor[Float32]", "Tensor[BFloat16]"),
        ("constant", "PrimFunc_Cos(%para1_x, F64(-1))", "PrimFunc_AssignAdd(Tensor(shape=[2, 2], value=...), %3)"),
        ("dynamic", "(2, 2)>)", "(2, -1)>)"),
        ("dynamic", "(2, 2)>)", "(-2)>)"),
    ],
)
def test_flaws_of_a_graph(name, old, new):
    assert not any(flaws(GRAPH).values())
    found = flaws(GRAPH.replace(old, new))
    assert found.pop(name) == ["AssignAdd" if name == "constant" else "Cos"] and not any(found.values())


def test_kernels_on_the_host_are_found_in_the_actors_too():
    on_host = "%5 = kernel_graph2:Custom-op0(%4[0])\n\t# device context: CPU_0 \n\t# shape : <(2, 2)> -> <(2, 2)> \n"
    assert flaws(on_host)["host"] == ["Custom"]
    assert not flaws(on_host.replace("CPU_0", "Ascend_0"))["host"]


RECORD = {"preset": "quick", "mode": "train", "precision": "fp32", "error": None, "host": [], "dynamic": [], "float64": []}
RECORD |= {"half": [], "constant": [], "launches": 100, "H2D": 3, "D2H": 1, "synchronisations": 2, "recompilations": 0}


@pytest.mark.parametrize(
    "changed",
    [
        {"error": "RuntimeError: no kernel"},
        {"host": ["Custom"]},
        {"dynamic": ["NonZero"]},
        {"float64": ["Cos"]},
        {"half": ["GroupNorm"]},
        {"constant": ["Assign"]},
        {"recompilations": 1},
        {"launches": 101},
        {"D2H": 2},
        {"synchronisations": 2.5},
    ],
    ids=str,
)
def test_problems_of_a_record(changed):
    budget = [100, 4, 2]
    assert not problems(RECORD, budget)
    refused = {"preset": "autoencoder", "mode": "train", "refused": "--precision is fp16: it is trained in fp32"}
    assert not problems({**refused, "precision": "fp16"}, None)
    assert problems({**refused, "precision": "fp32"}, None)
    (problem,) = problems(RECORD | changed, budget)
    assert problem.startswith("quick train fp32: ")
