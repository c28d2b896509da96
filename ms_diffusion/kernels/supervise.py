"""python supervise.py SECONDS COMMAND...: run a command and end it, with all processes that it starts, after SECONDS, or
when the caller ends, however it ends: then its end of this program's stdin is closed."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are the caller's, which may finish its work first
    signal.signal(number, lambda *_: None)
signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller may block some

seconds, *command = sys.argv[1:]
nothing, end = subprocess.DEVNULL, time.monotonic() + float(seconds)
try:
    child = subprocess.Popen(command, stdin=nothing, stdout=nothing, start_new_session=True)
except OSError as e:
    sys.exit(str(e))
try:
    while (code := child.poll()) is None and not select.select([sys.stdin], [], [], 0.02)[0]:
        if time.monotonic() > end:
            sys.exit(f"it does not end within {seconds} s")
finally:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
sys.exit(f"it was ended by signal {-code}" if code and code < 0 else code)
