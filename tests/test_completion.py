"""The script of `completion`, in a bash of its own: commands, flags and values; and the flags are those of --help."""

import contextlib
import functools
import io
import re
import shutil
import subprocess

import pytest
from runs import call, succeed

from ms_diffusion.__main__ import main
from ms_diffusion.commands import COMMANDS
from ms_diffusion.commands.completion import script
from ms_diffusion.training.presets import PRESETS

FLAG = re.compile(r"--[a-z][\w.-]*")
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


@functools.cache
def bash_script():
    return script("bash")


def complete(line):
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    typed = " ".join(f"'{word}'" for word in words)
    code = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _ms_diffusion; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-uc", f"{bash_script()}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@needs_bash
def test_completions():
    assert complete("ms-diffusion ") == list(COMMANDS)
    assert complete("ms-diffusion e") == ["evaluate", "export"]
    assert complete("ms-diffusion train --preset fashion-mnist-d") == ["fashion-mnist-dit"]
    assert {"scurve", "image-folder", "fashion-mnist"} <= set(complete("ms-diffusion train --data.name "))
    assert complete("ms-diffusion train --train.lr") == ["--train.lr", "--train.lr-decay"]
    assert complete("ms-diffusion train --train.no-lr") == ["--train.no-lr-decay"]
    assert complete("ms-diffusion sample runs/quick --sampler dpm") == ["dpmpp_2m"]
    assert complete("ms-diffusion doctor --") == ["--step", "--no-step", "--debug", "--no-debug", "--help"]
    assert complete("ms-diffusion completion ") == ["bash", "zsh"]
    for line in ("sample ", "sample runs/q", "train --run-dir ", "train --train.lr ", "nonsense ", "nonsense --"):
        assert complete(f"ms-diffusion {line}") == []  # bash completes files then


@needs_bash
def test_bash_knows_the_function():
    code = f"{bash_script()}\ncomplete -p ms-diffusion"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "complete -o default -F _ms_diffusion ms-diffusion"
    assert succeed("completion", "bash") == bash_script()
    assert succeed("completion", "zsh").endswith(bash_script())
    assert call("completion", "fish")[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_those_of_help(command):
    kinds = {(type(preset), type(preset.model)): name for name, preset in PRESETS.items()}
    calls = [["--preset", name] for name in kinds.values()] if command == "train" else [[]]
    lines = [line for flags in calls for line in help_of(command, *flags).splitlines()]
    options = " ".join(found[0] for line in lines if (found := re.match("[│ ] (-h, )?--.*?(  |$)", line)))
    line = next(line for line in bash_script().splitlines() if line.strip().startswith(f'"{command} -"*'))
    assert set(FLAG.findall(line)) == set(FLAG.findall(options))


def help_of(*args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([*args, "--help"])
    return out.getvalue()
