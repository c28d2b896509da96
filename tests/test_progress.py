"""Progress is a bar on a terminal, and now and then a line in a log file."""

import os
import pty
import sys
import termios

from ms_diffusion import progress
from ms_diffusion.progress import ProgressBar


def work(number, **options):
    with ProgressBar(total=number, desc="work", **options) as bar:
        for i in range(number):
            bar.update()
            bar.set_postfix_str(f"loss {i}")


def test_a_log_file_gets_few_lines(capsys, monkeypatch):
    work(10_000, dynamic_ncols=True)
    ProgressBar.write("a message", file=sys.stderr)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["0%", "100%"] and "loss 9999" in lines[1]
    assert lines[2:] == ["a message"] and not any("\r" in line for line in lines)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    list(ProgressBar(range(3), mininterval=0.0))
    assert len(capsys.readouterr().err.splitlines()) >= 3
    work(10, disable=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work(3)
        terminal.flush()
        text = ""
        while "\n" not in text:  # a terminal gives what it has by pieces
            text += os.read(reader, 4096).decode(errors="replace")
    os.close(reader)
    assert "\r" in text and "3/3" in text and "█" in text
