"""What each preset may tell a card in a step, and which presets are tried on which card.

    python -m tests.dry_run.budgets              # measure what the tests try and write budgets.json; some minutes
    python -m tests.dry_run.budgets quick        # only the presets named
    python -m tests.dry_run.budgets --all        # also every other preset, mode and precision; over half an hour
    python -m tests.dry_run.budgets --check      # write nothing, and say what is over its budget

budgets.json holds [launches, copies, synchronisations] of a step, by card and "preset mode precision"."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ms_diffusion.training.presets import PRESETS

from .run import FLAWS, PRECISIONS, SOCS

Case = tuple[str, str, str]  # preset, mode, precision

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("budgets.json")


def different() -> list[str]:
    """All presets but those whose graphs are another's: they differ in their data alone."""
    seen: dict[str, str] = {}
    for name, config in PRESETS.items():
        seen.setdefault(repr(replace(config, data=None)) if config.kind == "points" else name, name)
    return list(seen.values())


def combine(presets: Iterable[str], modes: str, precisions: str) -> list[Case]:
    return [(p, mode, precision) for p in presets for mode in modes.split() for precision in precisions.split()]


EVERY = different()
LIKE = {  # presets whose graphs differ from another's in numbers alone
    "fashion-mnist-seed": "fashion-mnist",
    "fashion-mnist-resnet": "quick",
    "fashion-mnist-large": "fashion-mnist-class",
    "scurve-exact": "scurve-seed",
}
TRIED = [name for name in EVERY if name not in LIKE]
PIXELS = [name for name in TRIED if PRESETS[name].kind == "pixels"]
NETWORKS = ("quick-class", "fashion-mnist", "scurve", "scurve-seed", "autoencoder", "latent-text")  # one of each
# What the tests try; each group is a process
GROUPS: dict[str, tuple[str, list[Case]]] = {
    "pixels": (SOCS[0], combine(PIXELS, "train", "fp32") + combine(("quick", "fashion-mnist"), "gradients", "fp32")),
    "others": (SOCS[0], combine([name for name in TRIED if name not in PIXELS], "train", "fp32")),
    "samples": (SOCS[0], combine(TRIED, "sample", "fp32") + combine(("quick-class", "latent-text"), "sample", "fp16 bf16")),
    "fp16": (SOCS[0], combine(NETWORKS, "train", "fp16")),
    "bf16": (SOCS[0], combine(("quick-class", "scurve", "autoencoder", "latent-text"), "train", "bf16")),
    **{
        soc: (soc, combine(("quick", "scurve"), "train sample", "fp16") + [("latent", "sample", "fp32")]) for soc in SOCS[1:]
    },
    "gpu": (
        "gpu",
        combine(NETWORKS, "train", "fp32") + [("quick-class", "train", "fp16"), ("latent-text", "sample", "fp32")],
    ),
}


def measured(card: str, cases: Iterable[Case], steps: int = 3) -> list[dict[str, Any]]:
    """The records of these cases, of a process of their own. Raises RuntimeError if it fails."""
    device = ["gpu"] if card == "gpu" else ["ascend", "--soc", card]
    command = [sys.executable, "-m", "tests.dry_run.run", *device, "--steps", str(steps), "--cases", json.dumps(list(cases))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout)["records"]


def key(record: dict[str, Any]) -> str:
    return " ".join(record[name] for name in ("preset", "mode", "precision") if name in record)


def cost(record: dict[str, Any]) -> list[float]:
    """Launches, copies between host and card, and synchronisations of a step."""
    return [record["launches"], round(record["H2D"] + record["D2H"], 2), record["synchronisations"]]


def problems(record: dict[str, Any], budget: list[float] | None) -> list[str]:
    """What is wrong with a record: graphs that a card should not get, and costs over the budget."""
    if "refused" in record:
        no_such_precision = record["precision"] != "fp32" and "--precision" in record["refused"]
        return [] if no_such_precision else [f"{key(record)}: {record['refused']}"]
    found = [record["error"]] if record["error"] else []
    for name, meaning in FLAWS.items():
        if record[name]:
            found.append(f"{meaning}: {', '.join(record[name])}")
    if not record["error"]:
        if record["recompilations"]:
            found.append(f"{record['recompilations']} graphs were compiled after the first step")
        if budget is None:
            found.append("it has no budget: run python -m tests.dry_run.budgets with its name")
        names = ("launches", "copies", "synchronisations")
        over = zip(names, cost(record), budget or cost(record), strict=True)
        found += [f"{spent} {name}, and {limit} are allowed" for name, spent, limit in over if spent > limit]
    return [f"{key(record)}: {problem}" for problem in found]


def load() -> dict[str, dict[str, list[float]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def save(budgets: dict[str, dict[str, list[float]]]) -> None:
    """A line for each case."""
    cards = []
    for card, rows in budgets.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items()]
        cards.append(f" {json.dumps(card)}: {{\n" + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(cards) + "\n}\n")


def groups(everything: bool) -> list[tuple[str, list[Case]]]:
    """(card, cases) of each process."""
    found, known = list(GROUPS.values()), {case for card, cases in GROUPS.values() if card == SOCS[0] for case in cases}
    for preset in EVERY * everything:
        cases = combine([preset], "train sample", " ".join(PRECISIONS))
        found.append((SOCS[0], [case for case in cases if case not in known]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dry_run.budgets")
    parser.add_argument("presets", nargs="*", help="by default all")
    parser.add_argument("--all", action="store_true", help="also what the tests do not try")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if unknown := set(args.presets) - set(EVERY):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(EVERY)}")
    found = []
    for card, cases in groups(args.all):
        cases = [case for case in cases if case[0] in (args.presets or EVERY)]
        for record in measured(card, cases) if cases else []:
            budgets = load()
            rows, name = budgets.setdefault(card, {}), f"{card} {key(record)}"
            if "refused" in record or record["error"]:
                print(f"{name}: {record.get('refused') or record['error']}", flush=True)
            else:
                print(f"{name}: {cost(record)}, host {record['host_ms']} ms, budget {rows.get(key(record))}", flush=True)
            budget = rows.get(key(record))
            if not args.check and "refused" not in record and not record["error"]:
                budget = rows[key(record)] = cost(record)
                save(budgets)
            found += [f"{card} {problem}" for problem in problems(record, budget)]
    print(*found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
