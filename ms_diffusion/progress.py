"""Progress on the terminal, or in a log file, where a bar that overwrites itself would become one line of megabytes."""

import io
import sys
import time
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines in a log file


class ProgressBar(tqdm):
    """tqdm's progress bar on stderr. Where stderr is no terminal, it is a line every half minute, and one at the end."""

    def __init__(self, *args: Any, **options: Any):
        self.in_log, self.shown = not sys.stderr.isatty(), -LOG_SECONDS
        super().__init__(*args, file=sys.stderr, **options | ({"ncols": 0, "dynamic_ncols": False} if self.in_log else {}))

    @staticmethod
    def status_printer(file: Any) -> Any:
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text.strip(), file=file, flush=True)

    def display(self, *args: Any, **options: Any) -> None:
        if not self.in_log:
            super().display(*args, **options)
        elif time.monotonic() - self.shown >= LOG_SECONDS:
            self.shown = time.monotonic()
            super().display()

    def clear(self, nolock: bool = False) -> None:
        if not self.in_log:
            super().clear(nolock)

    def close(self) -> None:
        if self.in_log and not self.disable:
            self.shown = -LOG_SECONDS
            self.display()
            self.shown, self.fp = float("inf"), io.StringIO()  # what tqdm writes to erase a bar
        super().close()
