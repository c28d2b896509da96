"""Build the stand-ins for CANN's and CUDA's libraries from the installed MindSpore: `libraries(device)`.

Which functions MindSpore's plugin needs is read from the plugin itself. Those whose answers matter are written by hand, in
ascend/ and gpu/; all others are generated and return 0, which means success in both. Each counts its calls (calls.cc).
All functions are in one library, and the others, such as libcudnn.so.8, are empty and refer to it."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
VERSIONS = ("2.9", "2.10")
DEVICES = ("ascend", "gpu")
MAIN = {"ascend": "libascendcl.so", "gpu": "libcuda.so.1"}  # the one with the functions
EMPTY = {
    "ascend": "acl_op_compiler acl_tdt_channel acl_tdt_queue ascend_hal ascendalog atb c_sec error_manager ge_compiler "
    "ge_runner gmem graph hccl msprofiler nnopbase opapi platform profapi register runtime",
    "gpu": "cudart:11.0 cublas:11 cudnn:8 cusolver:11 cusparse:11 cufft:10 curand:10 nvrtc:11.2 cuda_ops:11",
}
CANN_VERSION = "9.0.0"
# Functions that the Ascend plugin looks up by name at run time
LOOKED_UP = re.compile(r"(acl|Hccl|hccl|mstx|Msprof|aoe|rts?[A-Z]|ge[A-Z]|ascend|dcmi|hal)\w*")
# C++ that is not CANN's: Python's, the compiler's and MindSpore's own
FOREIGN = re.compile(r"_?Py|_ITM|__|_ZNK?9mindspore|_Jv|_ZT[IVH]|_Z[dnS]|_ZNK?S|dl")


def reason_to_skip(device: str) -> str:
    """Why no dry run is possible here; empty if one is."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the dry run is written for x86-64 and Linux"
    try:
        installed = version("mindspore")
    except PackageNotFoundError:
        return "mindspore is not installed as a wheel"
    if not installed.startswith(tuple(f"{v}." for v in VERSIONS)):
        return f"the dry run knows MindSpore {' and '.join(VERSIONS)}, not {installed}"
    if missing := [tool for tool in ("g++", "nm", "strings") if not shutil.which(tool)]:
        return f"the dry run needs {' and '.join(missing)} (gcc and binutils)"
    if not plugin(device).exists():
        return f"this MindSpore has no {plugin(device).name}"
    return ""


def mindspore_libraries() -> Path:
    return Path(find_spec("mindspore").submodule_search_locations[0]) / "lib"  # found without importing it


def plugin(device: str) -> Path:
    name = {"ascend": "libmindspore_ascend.so.2", "gpu": "libmindspore_gpu.so.11.6"}[device]
    return mindspore_libraries() / "plugin" / name


def libraries(device: str) -> Path:
    """The folder of the stand-ins, which is built in 10 s the first time, under $DRY_RUN_CACHE or the temporary folder."""
    key = hashlib.sha256(version("mindspore").encode() + str(plugin(device)).encode())
    for source in sorted([HERE / "build.py", *HERE.glob("calls.*"), *(HERE / device).iterdir()]):
        key.update(source.read_bytes())
    root = Path(os.environ.get("DRY_RUN_CACHE") or Path(tempfile.gettempdir()) / f"ms-dry-run-{os.getuid()}")
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{device}-{key.hexdigest()[:12]}"
    with open(root / f"{folder.name}.lock", "w") as lock:  # one process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            build(device, new)
            new.rename(folder)
    return folder


def build(device: str, out: Path) -> None:
    names = {"ascend": ascend_functions, "gpu": gpu_functions}[device]()
    objects = []
    for source in (HERE / "calls.cc", *sorted((HERE / device).glob("*.cc"))):
        objects.append(out / f"{source.stem}.o")
        abi = ["-D_GLIBCXX_USE_CXX11_ABI=0"] if source.stem == "ge" else []
        call("g++", "-O1", "-fPIC", "-std=c++17", "-w", *abi, "-c", source, "-o", objects[-1])
    assembly = out / "functions.s"
    assembly.write_text(assemble(sorted(names - defined(*objects, dynamic=False))))
    lib = out / ("cann/lib64" if device == "ascend" else "lib")
    lib.mkdir(parents=True)
    main = MAIN[device]
    call("g++", "-shared", f"-Wl,-soname,{main}", "-o", lib / main, *objects, assembly)
    empty = out / "empty.s"
    empty.write_text('.section .note.GNU-stack,"",@progbits\n')
    for item in EMPTY[device].split():
        name, _, number = item.partition(":")
        soname = f"lib{name}.so" + (f".{number}" if number else "")
        call("g++", "-shared", f"-Wl,-soname,{soname}", "-Wl,--no-as-needed", "-o", lib / soname, empty, lib / main)
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    # What MindSpore asks about the installation
    if device == "ascend":
        files = {
            "cann/compiler/version.info": f"Version={CANN_VERSION}\n",
            "cann/opp/vendors/config.ini": "",
            "python/hccl/__init__.py": "",
            "python/hccl/sys_version.py": f'__sys_version__ = "{CANN_VERSION}"\n',
        }
    else:
        files = {"cuda/bin/nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 11.6, V11.6.124'\n"}
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
        (out / name).chmod(0o755)


def ascend_functions() -> set[str]:
    """The functions of CANN that MindSpore links to, and those whose names are in it, to be looked up at run time."""
    lib = mindspore_libraries()
    ours = [*lib.glob("plugin/libmindspore_*ascend.so*"), *lib.glob("plugin/ascend/**/*.so")]
    own = defined(*lib.glob("*.so*"), *lib.glob("plugin/*.so*"), *lib.glob("plugin/ascend/*.so"))
    linked = {name for name in undefined(*ours) if "@" not in name and not FOREIGN.match(name)}
    parts = [lib / f"libmindspore_{part}.so" for part in ("pyboost", "ops", "profiler", "hardware_abstract")]
    texts = set(call("strings", "-n", "4", *ours, *parts).split("\n"))
    looked_up = {text for text in texts if LOOKED_UP.fullmatch(text)}
    aclnn = {name for name in looked_up if name.startswith("aclnn") and not name.endswith("GetWorkspaceSize")}
    return (linked | looked_up | {f"{name}GetWorkspaceSize" for name in aclnn}) - own


def gpu_functions() -> set[str]:
    """The functions of CUDA that the plugin links to, and those of libcuda_ops, MindSpore's own kernels."""
    needed = undefined(plugin("gpu"))
    cuda = {name.split("@")[0] for name in needed if re.search(r"@lib(cu|nv)", name) or re.match(r"cu[A-Z]|nvrtc", name)}
    return cuda | (needed & defined(mindspore_libraries() / "plugin/gpu/libcuda_ops.so.11"))


def assemble(names: list[str]) -> str:
    """A function for each name, which counts its calls and returns 0; the table of counts is what calls.cc reads."""
    functions, table, texts = [], [], []
    for i, name in enumerate(names):
        executor = name.startswith("aclnn") and name.endswith("GetWorkspaceSize")
        end = "jmp get_workspace_size" if executor else "xorl %eax, %eax\n ret"
        count = f"lock incq dry_run_calls+{16 * i + 8}(%rip)"
        functions.append(f".globl {name}\n.type {name}, @function\n{name}:\n {count}\n {end}")
        table.append(f" .quad name{i}, 0")
        texts.append(f'name{i}: .asciz "{name}"')
    return "\n".join([
        ".text", GET_WORKSPACE_SIZE, *functions,
        ".data", ".balign 8", ".globl dry_run_calls", ".hidden dry_run_calls", "dry_run_calls:", *table,
        ".globl dry_run_num_calls", ".hidden dry_run_num_calls", f"dry_run_num_calls: .quad {len(names)}",
        ".section .rodata", *texts,
        '.section .note.GNU-stack,"",@progbits\n',
    ])  # fmt: skip


# find_executor(the six registers of arguments, the arguments on the stack), in ascend/acl.cc
GET_WORKSPACE_SIZE = """.weak find_executor
.type get_workspace_size, @function
get_workspace_size:
 pushq %rbp
 movq %rsp, %rbp
 subq $64, %rsp
 movq %rdi, 0(%rsp)
 movq %rsi, 8(%rsp)
 movq %rdx, 16(%rsp)
 movq %rcx, 24(%rsp)
 movq %r8, 32(%rsp)
 movq %r9, 40(%rsp)
 movq %rsp, %rdi
 leaq 16(%rbp), %rsi
 call find_executor@PLT
 leave
 ret"""


def undefined(*paths: Path) -> set[str]:
    """Names, with the version after an @ where there is one."""
    return {line.split()[-1] for line in symbols("-D", "--undefined-only", *paths)}


def defined(*paths: Path, dynamic: bool = True) -> set[str]:
    return {line.split()[-1].split("@")[0] for line in symbols(*["-D"] * dynamic, "--defined-only", *paths)}


def symbols(*args: str | Path) -> list[str]:
    return [line for line in call("nm", *args).split("\n") if line and not line.endswith(":")]


def call(*command: str | Path) -> str:
    """What a tool prints. Raises RuntimeError with its complaint."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout
