"""Say whether this machine can train, and what to mend: `doctor`. MindSpore runs in processes of its own, so that one that
cannot be imported, or crashes, is a finding."""

import ast
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import versions
from ..data.fashion_mnist import MINI, find_fashion_mnist
from ..files import user_cache
from ..runtime import UserError, command
from .parse import parse

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"  # only a problem keeps a machine from training
Finding = tuple[str, str]  # one of them, and a line that says what was found and how to mend it
PACKAGES = ("numpy", "scipy", "PIL", "safetensors", "matplotlib", "tqdm", "tyro", "yaml")  # by the names of their imports
NEWEST_PYTHON = "3.12"  # of MindSpore 2.7.2 to 2.10; 3.11 of 2.7.1
FREE = 2e9  # bytes that caches and a run with its checkpoints may take

ALONE = """
import ctypes, signal
getattr(ctypes.CDLL(None), "prctl", id)(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the doctor
signal.pthread_sigmask(signal.SIG_SETMASK, [])
"""
START = """
import json, ms_diffusion.runtime as runtime
device = runtime.set_device("auto")
import mindspore as ms
from mindspore import Tensor
if (Tensor([1.0, 2.0]) + 1).asnumpy().tolist() != [2.0, 3.0]:
    raise RuntimeError(f"the device {device} computes wrong results")
there = [name for name in ("ascend", "gpu", "cpu") if getattr(ms.device_context, name).is_available()]
from ms_diffusion import kernels
print(json.dumps({"device": device, "there": there, "library": kernels.library(), "threads": kernels.thread_count()}))
"""
STEP = """
import json, ms_diffusion.runtime as runtime
runtime.set_device("auto")
from ms_diffusion.commands.benchmark import ImageWork, seconds_of
from ms_diffusion.training.presets import PRESETS
config = PRESETS["quick"]
seconds = sorted(seconds_of(ImageWork(config, config.train.batch_size).step, 5))[2]
print(json.dumps({"seconds": seconds, "steps": config.train.total_steps}))
"""


@dataclass
class Args:
    """Say whether this machine can train, and what to mend. The exit code is 0 if it can."""

    step: bool = True
    """Time a training step of the preset quick, which takes half a minute."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("doctor"))
    problems = 0
    for mark, text in examine(args.step):
        print(f"{mark:8}{text}", flush=True)
        problems += mark == PROBLEM
    print(f"{problems} problem{'s' * (problems != 1)} to mend" if problems else "this machine can train")
    return int(problems > 0)


def examine(step: bool = True) -> Iterator[Finding]:
    """All findings, in the order in which they matter."""
    yield from examine_packages()
    yield from examine_cann()
    yield from examine_environment(dict(os.environ))
    yield from examine_disk()
    if versions.mindspore_folder() is None:
        return
    found = run_python(START)
    if isinstance(found, str):
        yield PROBLEM, f"MindSpore does not start: {found}"
        return
    yield OK, f"MindSpore starts; devices: {', '.join(found['there'])}; --device auto takes {found['device']}"
    if found["device"] == "CPU":
        yield from examine_kernels(found)
    if step:
        timed = run_python(STEP)
        if isinstance(timed, str):
            yield PROBLEM, f"a training step fails: {timed}"
        else:
            ms, minutes = 1000 * timed["seconds"], timed["seconds"] * timed["steps"] / 60
            yield OK, f"a training step of quick takes {ms:.0f} ms, its {timed['steps']} steps {minutes:.0f} min"


def run_python(code: str) -> Any:
    """What a new Python prints as JSON in its last line, or a line that says how it failed."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        command = [sys.executable, "-c", ALONE + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired:
        return "it takes more than ten minutes"
    if done.returncode < 0:
        return f"it is killed by {signal.Signals(-done.returncode).name}"
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Warning)\b", line)]
        return (lines or done.stderr.split("\n") or ["no message"])[-1].strip() or "no message"


def examine_packages() -> Iterator[Finding]:
    yield OK, f"Python {platform.python_version()}, {platform.machine()}"
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        yield PROBLEM, f"packages are missing: pip install {' '.join(missing).replace('PIL', 'pillow')}"
    version = versions.mindspore_version()
    try:
        versions.check()
        yield OK, f"MindSpore {version or 'of unknown version'}"
    except UserError as e:
        yield PROBLEM, f"{e}; it exists for Python up to {NEWEST_PYTHON}"
    for needed in requirements("mindspore"):
        name, bounds = re.match(r"([\w.-]+)\s*\(?([^;)]*)", needed).groups()  # type: ignore[union-attr]
        if name == "numpy" and find_spec("numpy"):
            numpy = metadata.version("numpy")
            fits = all(within(numpy, bound.strip()) for bound in bounds.split(",") if bound.strip())
            mend = "" if fits else f', and MindSpore {version} needs {bounds}: pip install "numpy{bounds}"'
            yield (OK if fits else PROBLEM), f"NumPy {numpy}{mend}"


def requirements(package: str) -> list[str]:
    """What the metadata of an installed package require; nothing without them."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def within(version: str, bound: str) -> bool:
    """Whether a version keeps a bound such as "<2.0.0"; bounds of another form are kept."""
    found = re.match(r"(<=|>=|<|>)\s*([\d.]+)", bound)
    if not found:
        return True
    ours, theirs = versions.numbers(version), versions.numbers(found[2])
    return {"<": ours < theirs, "<=": ours <= theirs, ">": ours > theirs, ">=": ours >= theirs}[found[1]]


def read_version(*files: str | Path, pattern: str = r"[Vv]ersion\s*[:= ]\s*\[?([\d][\w.]*)") -> str | None:
    """The version in the first of these files that has one: "Version=8.3.RC1"."""
    for file in map(Path, files):
        if file.is_file() and (found := re.search(pattern, file.read_text(errors="replace"))):
            return found[1]
    return None


def examine_cann() -> Iterator[Finding]:
    """CANN, the drivers and the cards; a machine without cards needs none of them."""
    places = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
    sourced = os.environ.get("ASCEND_HOME_PATH")
    homes = [Path(place) for place in (sourced, *places) if place and Path(place).is_dir()]
    cards, gpus = glob.glob("/dev/davinci[0-9]*"), glob.glob("/dev/nvidia[0-9]*")
    if homes:
        files = [homes[0] / part / name for part in ("compiler", "runtime", ".") for name in ("version.info", "version.cfg")]
        cann, fitting = read_version(*files), supported_cann()
        text = f"CANN {cann or 'of unknown version'} in {homes[0]}"
        if cann and fitting and not any(cann.startswith(each) for each in fitting):
            mindspore = versions.mindspore_version()
            yield (
                PROBLEM,
                f"{text}, but MindSpore {mindspore} is made for CANN {', '.join(fitting)}: install a pair that fits",
            )
        else:
            yield OK, text
        if not sourced:
            yield NOTE, f"the environment of CANN is not set: source {homes[0]}/set_env.sh, or of its parent folder"
    if cards:
        driver = read_version("/usr/local/Ascend/driver/version.info")
        yield OK, f"{len(cards)} Ascend card(s), driver {driver or 'of unknown version'}"
        if not homes:
            fitting = " or ".join(supported_cann()) or "that MindSpore was made for"
            yield NOTE, f"there are Ascend cards but no CANN, so only the CPU is used: install CANN {fitting}"
    if gpus:
        driver = read_version("/proc/driver/nvidia/version", pattern=r"NVRM version:.*?\s(\d+\.\d[\d.]*)")
        yield OK, f"{len(gpus)} NVIDIA GPU(s), driver {driver or 'of unknown version'}; MindSpore needs CUDA 11.1 or 11.6"
    if not cards and not gpus:
        yield OK, "no Ascend card and no GPU: the CPU is used"


def supported_cann() -> list[str]:
    """The versions of CANN, such as "8.3", that the installed MindSpore was made for, from its own check of them."""
    folder = versions.mindspore_folder()
    file = folder / "run_check" / "_check_version.py" if folder else Path()
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"class AscendEnvChecker.*?self\.version\s*=\s*(\[[^\]]*\])", text, re.DOTALL)
    return ast.literal_eval(found[1]) if found else []


def examine_environment(environment: dict[str, str]) -> Iterator[Finding]:
    """Settings that are known to break or slow down training."""
    try:
        versions.check_limits()
    except UserError as e:
        yield PROBLEM, str(e)
    if "mindspore" in sys.modules:
        yield NOTE, "mindspore is imported before ms_diffusion, and a CPU may be several times slower: import it later"
    info = Path("/proc/cpuinfo")
    avx512 = info.is_file() and "avx512f" in info.read_text()
    if avx512 and environment.get("ONEDNN_MAX_CPU_ISA", "AVX2") != "AVX2":
        yield NOTE, "convolutions of MindSpore are up to 100 times slower with AVX-512: unset ONEDNN_MAX_CPU_ISA"
    if environment.get("MS_COMPILER_CACHE_ENABLE") == "1":
        yield PROBLEM, "MindSpore's compile cache starts functions with wrong weights: unset MS_COMPILER_CACHE_ENABLE"
    if environment.get("MS_DIFFUSION_KERNELS") == "off":
        yield NOTE, "this library's CPU kernels are off, which is several times slower: unset MS_DIFFUSION_KERNELS"
    ranks = environment.get("RANK_SIZE") or environment.get("MS_WORKER_NUM") or "1"
    if ranks != "1":
        yield NOTE, f"this process is one of {ranks} ranks: it waits for the others unless msrun or a rank table starts them"


def examine_disk() -> Iterator[Finding]:
    folder, searched = find_fashion_mnist()
    if folder:
        yield OK, f"Fashion-MNIST in {folder}"
    else:
        yield NOTE, "Fashion-MNIST is not here: presets that need it download 31 MB; see --data.dir, or the preset quick"
    mini = find_spec("numpy") and MINI.is_dir()
    yield (
        (OK if mini else PROBLEM),
        "the embedded images " + ("are there" if mini else "are missing: install the package anew"),
    )
    places = {"this folder": Path.cwd()}
    try:
        places = {"caches": user_cache()} | places
    except OSError as e:
        yield NOTE, f"caches end with each program: {e}; set XDG_CACHE_HOME to a folder of your own"
    for name, path in places.items():
        free = shutil.disk_usage(path).free
        text = f"{name}: {path}, {free / 1e9:.1f} GB free"
        if not os.access(path, os.W_OK | os.X_OK):
            mend = "set XDG_CACHE_HOME to a folder" if name == "caches" else "choose a --run-dir"
            yield NOTE, f"{text}, but it cannot be written to: {mend} that can"
        else:
            yield (OK if free > FREE else NOTE), text + ("" if free > FREE else ": free some space")


def examine_kernels(found: dict[str, Any]) -> Iterator[Finding]:
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next(filter(None, (shutil.which(name) for name in compilers if name)), None)
    if found["library"]:
        yield OK, f"this library's CPU kernels are built, by {compiler or 'an earlier compiler'}; {found['threads']} threads"
    elif os.environ.get("MS_DIFFUSION_KERNELS") != "off":
        mend = "see MindSpore's and the compiler's messages" if compiler else "install g++, for example apt install g++"
        yield NOTE, f"this library's CPU kernels cannot be built, so training is several times slower: {mend}"
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) < len(os.sched_getaffinity(0)):
        yield NOTE, f"OMP_NUM_THREADS is {wanted}, fewer than the {len(os.sched_getaffinity(0))} cores: unset it"
