"""Write what a run has recorded as one HTML page: `report runs/quick`. Weights are not read."""

import base64
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ..files import check_output, read_bytes, write
from ..images import loss_figure, picture_size, thinned
from ..metrics.scores import format_report
from ..runtime import UserError, command, one_line
from ..training.config import Config
from ..training.loop import loss_curves
from ..training.presets import PRESETS
from ..training.runs import WEIGHTS, bundled_models, previews
from .parse import parse
from .runs import Summary, read, read_scores, show_scores, summarize
from .train import command_of, flags_of, from_preset, values_of

MOST = 24  # pictures of a kind, evenly spaced where a run has more
SIZE = 4.0, 2.7  # inches of a curve, so that its letters can be read on a phone
COLOURS = "#3d8fd1", "#e8853a", "#3fa66b", "#dd5a52"  # which stand out on white and on black
INK = "#010203"  # the colour of axes, which becomes that of the page's text
IN_LOSS = {"step", "epoch", "skipped", "loss", "val_loss", "val_loss_ema"}  # drawn with the loss, or not at all
TITLES = {
    "fid": "FID",
    "lr": "learning rate",
    "img_per_s": "images or points per second",
    "grad_norm": "norm of the gradients",
}
PICTURES = {"step": "Samples", "denoise-row": "From noise to data", "first-stage": "Reconstructions of the first stage"}
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e9ed; --soft: #9aa4af; --line: #3a424c; --box: #1e232a }
}
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2rem; font-size: 1.25rem }
p, figcaption, footer { color: var(--soft); overflow-wrap: anywhere }
pre { overflow-x: auto; padding: .75rem; border-radius: 6px; background: var(--box); font-size: .8125rem }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere } pre.command span { display: inline-block }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; min-width: 0 } svg { display: block; width: 100%; height: auto } svg text { fill: currentColor }
img { display: block; max-width: 100%; height: auto; border-radius: 4px }
table { border-collapse: collapse; font-size: .875rem } td, th { padding: .3rem .75rem .3rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere } th { font-weight: 600 }
summary { cursor: pointer; margin: 1rem 0 }
"""


@dataclass
class Args:
    """Write what a run has recorded as one HTML page: curves, samples, scores, configuration, and its command."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, or the name of a bundled model."""
    out: str | None = None
    """Path of the page; by default report.html in the run's folder, and in this one for a bundled model."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("report"))
    path = Path(args.run)
    out = Path(args.out or (path if path.is_dir() else Path()) / "report.html")
    if not path.exists() and args.run in bundled_models():
        path = WEIGHTS / args.run
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run's folder, such as runs/quick, or a bundled model")
    check_output(out)
    page = render(path).encode(errors="backslashreplace")  # a folder's name may be no text
    write(out, lambda file: file.write(page))
    print(one_line(f"{out}: {len(page) / 1e6:.1f} MB"))
    return 0


def render(path: Path) -> str:
    """The page of a run. Raises UserError if it has no configuration that can be read."""
    config, rows, state = read(path)
    summary = summarize(path)
    name = path.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        table(facts(summary, config, rows, state)),
        section("Command", show_command(config, path)),
        section("Curves", grid(curves(rows))),
        *(section(title, grid(figures)) for title, figures in pictures(path)),
        section("Scores", show_evaluation(path)),
        section("Configuration", show_config(config)),
        f"<footer><p>Written by ms_diffusion on {when(time.time())}.</p></footer>",
    ]
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{escape(name)}</title>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<style>{STYLE}</style>\n<body>\n{body}\n</body>\n</html>\n'


def section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def grid(figures: Iterable[str]) -> str:
    content = "".join(figures)
    return f'<div class="columns">\n{content}</div>' if content else ""


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>\n"


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table of texts; the first of each row is a title."""
    lines = ["".join(f"<th>{escape(title)}</th>" for title in head)] if head else []
    for first, *rest in rows:
        lines.append(f"<th>{escape(str(first))}</th>" + "".join(f"<td>{escape(str(each))}</td>" for each in rest))
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def facts(summary: Summary, config: Config, rows: list[dict], state: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the run is, and how far it is."""
    skipped = sum(row.get("skipped", 0) for row in rows)
    epoch = next((f", epoch {row['epoch']:.4g}" for row in reversed(rows) if "epoch" in row), "")
    versions = state.get("versions")
    known = isinstance(versions, dict) and ", ".join(f"{name} {version}" for name, version in versions.items())
    ranks = state.get("world_size", 1)
    found = {
        "kind and data": f"{config.kind}, {config.data.name}" + (f", {config.data.dir}" if config.data.dir else ""),
        "step": f"{summary.step} of {summary.total_steps}{epoch}",
        "state": summary.problem or (summary.writer and f"being trained by {summary.writer}") or
        ("not finished" if summary.command else "finished"),
        "last loss": None if summary.loss is None else f"{summary.loss:.4g}",
        "score": show_scores(summary.scores),
        "skipped steps": f"{skipped:g}" if skipped else None,
        "trained with": ", ".join(filter(None, [known or None, f"{ranks} ranks" if ranks > 1 else None])),
        "size": f"{summary.bytes / 1e6:.1f} MB",
        "last change": when(summary.changed),
    }  # fmt: skip
    return [(name, value) for name, value in found.items() if value]


def show_command(config: Config, path: Path) -> str:
    if not (text := command_of(config, path)):
        return "<p>This run was made in Python: its data, or its network, are those of no command.</p>"
    parts = re.sub(" (?=--)", "</span> <span>", escape(text))  # a line ends before a flag, not in it
    note = "The same command goes on with a run that is not finished."
    return f'<pre class="command"><span>{parts}</span></pre>\n<p>{note}</p>'


# Curves


def curves(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The loss, with that of held-out data, then each other number of the log."""
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    inked = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color".split()
    options: Any = {"axes.prop_cycle": cycler(color=COLOURS)} | dict.fromkeys(inked, INK)
    options |= dict.fromkeys(["axes.facecolor", "figure.facecolor", "legend.facecolor"], "none")
    options |= {"svg.fonttype": "none", "svg.hashsalt": "", "legend.framealpha": 0, "font.size": 9}
    with mpl.rc_context(options):
        if drawn := loss_curves(rows):
            steps, losses, _, held = drawn
            yield figure(svg(loss_figure(steps, losses, (), held, SIZE)), "loss")
        for name in dict.fromkeys(name for row in rows for name in row if name not in IN_LOSS):
            chart = Figure(figsize=SIZE, layout="constrained")
            axes = chart.subplots()
            steps, values = thinned(*zip(*((row["step"], row[name]) for row in rows if name in row), strict=True))
            axes.plot(steps, values, "-" if len(steps) > 20 else ".-")
            axes.set(xlabel="step")
            yield figure(svg(chart), TITLES.get(name, name))


def svg(chart: Any) -> str:
    """A figure of matplotlib as an element of a page, in the colour of its text."""
    file = io.StringIO()
    chart.savefig(file, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<svg", '<svg role="img"', 1)


# Pictures


def pictures(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The title and the pictures of each kind of preview, in the order of their steps."""
    kinds = previews(path)
    for kind in sorted(kinds, key=lambda kind: [*PICTURES, kind].index(kind)):
        files = kinds[kind]
        chosen = np.unique(np.linspace(0, len(files) - 1, min(len(files), MOST)).round().astype(int))
        left_out = f" ({len(chosen)} of {len(files)})" if len(chosen) < len(files) else ""
        yield PICTURES.get(kind, kind) + left_out, [picture(*files[i]) for i in chosen]


def picture(step: int, file: Path) -> str:
    caption = f"step {step}" if step else file.stem
    try:
        height, width = picture_size(file)
        data = base64.b64encode(read_bytes(file)).decode()
    except (OSError, ValueError, UserError) as e:
        return figure("", f"{caption}: {file.name} cannot be read: {e}")
    place = f'width="{width}" height="{height}" alt="{escape(caption)}" loading="lazy"'
    return figure(f'<img {place} src="data:image/png;base64,{data}">', caption)


# Scores and configuration


def show_evaluation(path: Path) -> str:
    record = read_scores(path)
    if not record:
        return ""
    *lines, protocol = format_report(record).split("\n")
    return f"<pre>{escape(chr(10).join(lines))}</pre>\n<p>{escape(protocol)}</p>"


def show_config(config: Config) -> str:
    """What differs from the nearest preset, and all of it."""
    everything = escape(json.dumps(config.to_record(), indent=1))
    details = f"<details>\n<summary>All values</summary>\n<pre>{everything}</pre>\n</details>"
    if not (found := from_preset(config)):
        return details
    preset, values = found
    theirs = values_of(PRESETS[preset])
    rows = [(flags_of({name: value})[0], show(value), show(theirs[name])) for name, value in values.items()]
    if not rows:
        return f"<p>All values are those of the preset {escape(preset)}.</p>\n{details}"
    return f"<p>What differs from the preset {escape(preset)}:</p>\n{table(rows, ['flag', 'this run', preset])}\n{details}"


def show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
