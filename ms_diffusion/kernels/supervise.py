"""python supervise.py SECONDS COMMAND...: run a command and end it, with all processes that it starts, after SECONDS, or
when the caller ends, however it ends: then its end of this program's stdin is closed. It prints "done" if the command
succeeds, which no other end can be taken for."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time


def main(seconds: str, *command: str) -> str | None:
    """None if the command succeeds, or how it has ended if it does not say so itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are the caller's, which may finish its work first
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller may block some
    nothing, end = subprocess.DEVNULL, time.monotonic() + float(seconds)
    try:
        child = subprocess.Popen(command, stdin=nothing, stdout=nothing, start_new_session=True)
    except OSError as e:
        return str(e)
    try:
        while (code := child.poll()) is None and not select.select([sys.stdin], [], [], 0.02)[0]:
            if time.monotonic() > end:
                return f"it does not end within {seconds} s"
        if code == 0:
            print("done")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return f"it was ended by signal {-code}" if code and code < 0 else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
