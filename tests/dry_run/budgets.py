"""What each preset may tell a card in a step, and which presets are tried on which card.

    python -m tests.dry_run.budgets              # measure everything anew and write budgets.json; about 20 minutes
    python -m tests.dry_run.budgets quick        # only the presets named
    python -m tests.dry_run.budgets --check ...  # write nothing, and say what is over its budget

budgets.json holds [launches, copies, synchronisations] of a step, by card and "preset mode precision"."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .run import PRECISIONS, SOCS

Case = tuple[str, str, str]  # preset, mode, precision

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("budgets.json")
# One preset of each network, and of each loss that has graphs of its own
NETWORKS = ("quick-class", "fashion-mnist", "scurve", "scurve-seed", "autoencoder", "latent-text")
FEW = ("quick", "scurve", "latent")


def presets() -> list[str]:
    """All presets but those whose graphs are another's: they differ in their data alone."""
    from dataclasses import replace

    from ms_diffusion.training.presets import PRESETS

    seen: dict[str, str] = {}
    for name, config in PRESETS.items():
        seen.setdefault(repr(replace(config, data=None)) if config.kind == "points" else name, name)
    return list(seen.values())


def all_cases() -> dict[str, list[Case]]:
    """Every case that has a budget, by card."""
    every = [(preset, mode, precision) for precision in PRECISIONS for mode in ("train", "sample") for preset in presets()]
    few = [(preset, mode, precision) for preset in FEW for mode in ("train", "sample") for precision in ("fp32", "fp16")]
    gpu = [(preset, mode, precision) for preset, mode, precision in every if preset in NETWORKS and precision != "bf16"]
    return {SOCS[0]: every, **{soc: few for soc in SOCS[1:]}, "gpu": gpu}


def measured(card: str, cases: Iterable[Case], steps: int = 5) -> list[dict[str, Any]]:
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
    if "refused" in record:  # the kind has no such precision
        return []
    found = [record["error"]] if record["error"] else []
    for name, meaning in {"host": "on the host", "dynamic": "of a dynamic shape", "float64": "in float64"}.items():
        if record[name]:
            found.append(f"{meaning}: {', '.join(record[name])}")
    if not record["error"]:
        if record["recompilations"]:
            found.append(f"{record['recompilations']} graphs were compiled after the first step")
        if budget is None:
            found.append("it has no budget: run python -m tests.dry_run.budgets with its name")
        names = ("launches", "copies", "synchronisations")
        over = zip(names, cost(record), budget or cost(record), strict=True)
        found += [f"{cost} {name}, and {limit} are allowed" for name, cost, limit in over if cost > limit]
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dry_run.budgets")
    parser.add_argument("presets", nargs="*", help="by default all")
    parser.add_argument("--card", nargs="+", help="by default all", choices=(*SOCS, "gpu"), default=(*SOCS, "gpu"))
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    budgets, found = load(), []
    for card, cases in all_cases().items():
        for preset in dict.fromkeys(case[0] for case in cases if card in args.card):  # a process each
            if args.presets and preset not in args.presets:
                continue
            for record in measured(card, [case for case in cases if case[0] == preset]):
                rows = budgets.setdefault(card, {})
                budget = rows.get(key(record)) if args.check or record.get("error") or "refused" in record else cost(record)
                found += [f"{card} {problem}" for problem in problems(record, budget)]
                if "refused" in record or record["error"]:
                    print(f"{card} {key(record)}: {record.get('refused') or record['error']}")
                    rows.pop(key(record), None)
                    continue
                rows[key(record)] = cost(record)
                print(f"{card} {key(record)}: {rows[key(record)]}, host {record['host_ms']} ms", flush=True)
                if not args.check:
                    save(budgets)
    print(*found, sep="\n")
    return bool(args.check and found)


if __name__ == "__main__":
    sys.exit(main())
