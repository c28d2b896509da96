"""The doctor: what it makes of machines that can train and that cannot; and which MindSpore is taken at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_refused, call

from ms_diffusion import versions
from ms_diffusion.commands import doctor
from ms_diffusion.commands.doctor import NOTE, OK, PROBLEM
from ms_diffusion.runtime import UserError
from ms_diffusion.versions import numbers

GOOD = {"device": "CPU", "there": ["cpu"], "library": "x.so", "threads": 2, "seconds": 0.1, "steps": 4800}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make it look as if a MindSpore of this version were installed; None: no MindSpore."""

    def install(version):
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
        monkeypatch.setattr(versions, "mindspore_folder", lambda: version and tmp_path)
        monkeypatch.setattr(versions, "check", versions.check.__wrapped__)

    return install


@pytest.mark.parametrize("version", ["2.7.1", "2.7.1.post1", "2.7.2", "2.8.0rc1", "2.10.0", "3.0"])
def test_versions_that_are_taken(install, version):
    install(version)
    versions.check()
    assert versions.mindspore_version() == version


@pytest.mark.parametrize("version", ["2.7.0", "2.6.0", "2.2.14", None])
def test_versions_that_are_refused_in_one_line(install, version):
    install(version)
    for command in ("train", "sample", "benchmark"):
        assert_refused(call(command), version or "not installed", "2.7.1")
    with pytest.raises(UserError, match="2.7.1"):
        versions.check()
    assert any(mark == PROBLEM and "2.7.1" in text for mark, text in doctor.examine_packages())


def test_the_installed_mindspore():
    import mindspore

    assert versions.mindspore_version() == mindspore.__version__
    assert versions.mindspore_folder() == Path(mindspore.__file__).parent
    assert doctor.supported_cann() and all(numbers(version) >= (7, 8) for version in doctor.supported_cann())
    assert not [text for mark, text in doctor.examine_packages() if mark == PROBLEM]


def test_bounds_of_versions():
    assert doctor.within("1.26.4", "<2.0.0") and doctor.within("1.26.4", ">=1.20.0") and doctor.within("2.4.6", "!=1")
    assert (
        not doctor.within("2.0.0", "<2.0.0") and not doctor.within("1.19", ">=1.20.0") and doctor.within("2.0.0", "<=2.0.0")
    )


@pytest.mark.parametrize("cann, mark", [(None, OK), ("7.0.RC1", PROBLEM)])
def test_cann(tmp_path, monkeypatch, cann, mark):
    cann = cann or f"{doctor.supported_cann()[-1]}.RC1"
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text(f"Name=x\nVersion={cann}\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    found = [mark for mark, text in doctor.examine_cann() if cann in text]
    assert found == [mark]


def test_settings_that_do_harm():
    def marks(**settings):
        return [
            (mark, text.split()[-1]) for mark, text in doctor.examine_environment(settings) if "imported before" not in text
        ]

    assert marks() == [] == marks(ONEDNN_MAX_CPU_ISA="AVX2", RANK_SIZE="1")
    assert marks(MS_COMPILER_CACHE_ENABLE="1") == [(PROBLEM, "MS_COMPILER_CACHE_ENABLE")]
    assert marks(MS_DIFFUSION_KERNELS="off") == [(NOTE, "MS_DIFFUSION_KERNELS")]
    assert [mark for mark, _ in marks(RANK_SIZE="8")] == [NOTE]


def test_caches_that_others_could_change(tmp_path, monkeypatch):
    def caches():
        return [(mark, text) for mark, text in doctor.examine_disk() if text.startswith("caches")]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [str(tmp_path) in text for _, text in caches()] == [True]
    tmp_path.chmod(0o777)
    [(mark, text)] = caches()
    assert mark == NOTE and "XDG_CACHE_HOME" in text and "\n" not in text


def test_how_a_process_fails(monkeypatch):
    assert doctor.run_python("print('noise'); print('[1]')") == [1]
    assert doctor.run_python("import os; os.abort()") == "it is killed by SIGABRT"
    assert "libnothing.so" in doctor.run_python("import ctypes; ctypes.CDLL('libnothing.so')")
    assert doctor.run_python("print('no JSON')") == "no message"


@pytest.mark.parametrize("answer, code", [(GOOD, 0), (GOOD | {"library": None}, 0), ("it is killed by SIGILL", 1)])
def test_exit_codes(monkeypatch, answer, code):
    monkeypatch.setattr(doctor, "run_python", lambda code: answer)
    ended, out, err = call("doctor")
    assert ended == code and not err and (PROBLEM in out) == bool(code)
    assert code == 0 or "SIGILL" in out


def run_doctor(folder, *flags):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-m", "ms_diffusion", "doctor", *flags]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_a_mindspore_that_cannot_be_imported(tmp_path):
    (tmp_path / "mindspore").mkdir()
    (tmp_path / "mindspore" / "__init__.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')\n")
    done = run_doctor(tmp_path)
    assert done.returncode == 1 and "libfoo.so" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_this_machine_can_train(tmp_path):
    done = run_doctor(tmp_path)
    assert done.returncode == 0 and "a training step of quick takes" in done.stdout, done.stdout + done.stderr
