"""A dry run: MindSpore on a card that is not there.

MindSpore's wheel has the plugins for Ascend and GPU, but not CANN's and CUDA's libraries. build.py makes stand-ins for them:
every function answers "success" and computes nothing, the card's memory is the host's, and calls are counted. With these
MindSpore believes in a card. It compiles each graph for it, chooses the kernels and launches every one, on any x86-64 CPU;
the results are garbage.

What this proves: MindSpore has a kernel for each operator on that card, none runs on the host instead, no graph has a
dynamic shape or float64 or is compiled twice, and how many launches, copies and synchronisations a step takes. What it
cannot prove: that CANN or CUDA takes these types and shapes, what the results are, how fast a card is, graph kernel fusion
(O1), the GE backend, and several ranks, which wait for each other in the setup of HCCL and NCCL.

    python -m tests.dry_run.run ascend --preset quick --mode train sample --precision fp32 fp16 --soc Ascend910B2
    python -m tests.dry_run.budgets quick          # measure, and write budgets.json, which tests/test_dry_run.py compares
"""
