"""What a run over scans tells: a bar on a terminal, a line a scan elsewhere, and a log.

    with Progress(len(subjects), log=out / LOG) as progress:
        with progress.scan("sub-01"):
            progress.stage("reading")
            progress.stage("restoring", 500)
            progress.advance(16)
            progress.tell("done")

An estimate is made of what was measured in this run, and there is none before.
"""

import contextlib
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lesion.files import readable

LOG = "tf-lesion.log"
QUIET, NORMAL, VERBOSE = -1, 0, 1  # what goes to the screen; the log is always whole
# Seconds of a scan's stages on two cores, in their order: how much of it is done is told by these
# until a scan was measured.
STAGES = {"reading": 1.0, "finding": 4.0, "aligning": 8.0, "restoring": 25.0, "writing": 4.0}
SOON = 0.05  # of the restoration; before, its speed is not known
REDRAWN = 0.1  # s between two pictures of the bar
BAR = "{desc}|{bar}| {percentage:3.0f} %{postfix}"
LONGEST_NAME = 30  # letters; a terminal has 80
LINE = "%(asctime)s %(levelname)s %(message)s"


class Progress:
    """Tells of a number of scans, one after the other.

    Args:
        count: how many scans there are.
        screen: `QUIET` (what fails), `NORMAL` or `VERBOSE` (the seconds of each stage too).
        log: a file to append to; begun with the first scan that writes. None for none.

    Attributes:
        first: whether there was no log before.
    """

    def __init__(self, count: int, *, screen: int = NORMAL, log: Path | None = None):
        self.count, self.screen, self.number = count, screen, 0
        self.first = log is not None and not log.exists()
        self._clock = _Clock(count)
        self._name, self._bar, self._drawn = "", None, 0.0
        self._log = _logger(log)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()
        for handler in list(self._log.handlers):
            handler.close()
            self._log.removeHandler(handler)

    @contextlib.contextmanager
    def scan(self, name: str) -> Iterator[None]:
        """Around all that is done with one scan; what it raises is logged, and raised."""
        self.number, self._name = self.number + 1, name
        self._clock.begin()
        try:
            yield
        except BaseException as error:
            known = isinstance(error, ValueError | OSError)
            self.note(f"{name}: {_sentence(error)}", error=None if known else error)
            raise
        finally:
            self._hide()

    def stage(self, name: str, total: int = 0) -> None:
        """A stage of a scan begins, one of `STAGES`; `total` counts what `advance` is told."""
        self._clock.stage(name, total)
        self._draw(at_once=True)

    def advance(self, count: int = 1) -> None:
        """So much more of the stage is done."""
        self._clock.advance(count)
        self._draw()

    def tell(self, status: str, reason: str = "") -> None:
        """What became of the scan: a line on the screen and in the log."""
        self._hide()
        worked = self._clock.end(measured=status == "done")
        seconds = f" in {_duration(worked)}" if status == "done" else ""
        line = f"{self._which()}: {status}{seconds}"
        self._say(line)
        if reason:
            print(f"error: {self._name}: {reason}", file=sys.stderr, flush=True)
        level = logging.ERROR if reason else logging.INFO
        text = f"{line}: {reason}" if reason else line
        self._log.log(level, "%s", text, extra={"outcome": status})
        if status == "done":
            self.detail(f"  {self._clock.table()}")

    def warn(self, text: str) -> None:
        """A warning, to the screen and the log."""
        self._hide()
        self._log.warning("%s: %s", self._name, text)
        if self.screen > QUIET:
            print(f"warning: {self._name}: {text}", file=sys.stderr, flush=True)

    def note(self, text: str, *, error: BaseException | None = None) -> None:
        """A line in the log, with where an unexpected error came from."""
        self._hide()
        told = "".join(traceback.format_exception(error)) if error else ""
        self._log.log(logging.ERROR if error else logging.INFO, "%s", f"{text}\n{told}".rstrip())
        if error and self.screen >= VERBOSE:
            sys.stderr.write(told)

    def say(self, text: str) -> None:
        """A line for the screen and the log, unless it is to be quiet."""
        self._log.info("%s", text)
        self._say(text)

    def detail(self, text: str) -> None:
        """A line for the log, and for the screen of who wants to know."""
        self._log.info("%s", text)
        if self.screen >= VERBOSE:
            self._say(text)

    def _say(self, text):
        self._hide()
        if self.screen > QUIET:
            print(text, flush=True)

    def _which(self):
        return f"[{self.number}/{self.count}] {self._name}" if self.count > 1 else self._name

    # The bar ------------------------------------------------------------------------------------

    def _draw(self, *, at_once=False):
        now = time.monotonic()
        if self.screen <= QUIET or not sys.stderr.isatty():
            return
        if not at_once and now - self._drawn < REDRAWN:
            return
        self._drawn = now
        which, left = self._which(), self._clock.left(self.number)
        if len(which) > LONGEST_NAME:
            which = f"{which[: LONGEST_NAME - 3]}..."
        text = f"{which}: {self._clock.name:9} "
        if self._bar is None:
            self._bar = _bar(text)
        self._bar.set_description_str(text, refresh=False)
        self._bar.ncols = shutil.get_terminal_size().columns - 1
        self._bar.n = self._clock.share()
        whole = " in all" if self.count > 1 else ""
        text = "" if left is None else f"{_duration(left)} left{whole}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.refresh()

    def _hide(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Clock:
    """Seconds of the stages of this scan and of those before, and what follows from them."""

    def __init__(self, count):
        self.count, self.name, self.spent, self.done = count, "", {}, []
        self.guess, self.total, self.counted, self.began = dict(STAGES), 0, 0, 0.0
        self.scan_began = time.monotonic()

    def begin(self):
        self.name, self.spent, self.total, self.counted = "", {}, 0, 0
        self.scan_began = time.monotonic()

    def stage(self, name, total):
        self._close()
        self.name, self.total, self.counted, self.began = name, total, 0, time.monotonic()

    def advance(self, count):
        self.counted += count

    def end(self, *, measured):
        """Seconds of the scan; those of a whole one are what the next is expected to take."""
        self._close()
        self.name = ""
        worked = time.monotonic() - self.scan_began
        if measured:
            self.done.append(worked)
            self.guess |= self.spent
        return worked

    def _close(self):
        if self.name:
            seconds = time.monotonic() - self.began
            self.spent[self.name] = self.spent.get(self.name, 0.0) + seconds
            self.guess.setdefault(self.name, 0.0)

    def table(self):
        return ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.spent.items())

    def part(self):
        """How much of the stage is done, 0 to 1."""
        return min(self.counted / self.total, 1.0) if self.total else 0.0

    def share(self):
        """How much of the scan is done, 0 to 1."""
        names = list(self.guess)
        at = names.index(self.name) if self.name in self.guess else 0
        before = sum(self.guess[name] for name in names[:at])
        return (before + self.part() * self.guess.get(self.name, 0.0)) / sum(self.guess.values())

    def left(self, number):
        """Seconds until all scans are done; None before anything was measured."""
        part, now, names = self.part(), time.monotonic(), list(self.guess)
        measured = self.done or part >= SOON or "restoring" in self.spent
        if not measured or self.name not in names:
            return None
        in_stage, slower = now - self.began, 1.0
        if not self.done and self.spent:  # than `STAGES` have it
            slower = sum(self.spent.values()) / sum(self.guess[name] for name in self.spent)
        if part >= SOON:
            rest = in_stage * (1 - part) / part
        else:
            rest = max(slower * self.guess[self.name] - in_stage, 0.0)
        rest += slower * sum(self.guess[name] for name in names[names.index(self.name) + 1 :])
        each = sum(self.done) / len(self.done) if self.done else now - self.scan_began + rest
        return rest + (self.count - number) * each


def _bar(text: str) -> Any:
    from tqdm import tqdm

    columns = shutil.get_terminal_size().columns - 1
    shown = {"bar_format": BAR, "ncols": columns, "leave": False, "file": sys.stderr}
    return tqdm(desc=text, total=1.0, **shown)


def _duration(seconds):
    """Seconds as people say them: 0.3 s, 41 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours} h {of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sentence(error):
    return str(error) or type(error).__name__


def _logger(path):
    """A logger of its own, that holds lines back until the folder of its file is there."""
    log = logging.Logger("tf_lesion.detection", logging.INFO)
    if path is None:
        log.addHandler(logging.NullHandler())
        return log
    handler = _Patient(path)
    handler.setFormatter(logging.Formatter(LINE))
    log.addHandler(handler)
    return log


class _Patient(logging.Handler):
    """Appends to a file from the first outcome on: what is refused before leaves nothing behind."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.waiting, self.begun = path, [], path.exists()

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record, and those that waited; a log that cannot be written stops nothing."""
        self.waiting.append(readable(f"{self.format(record)}\n"))
        self.begun = self.begun or record.levelno >= logging.ERROR or hasattr(record, "outcome")
        if not (self.begun and self.path.parent.is_dir()):
            return
        with contextlib.suppress(OSError), self._opened() as file:
            file.writelines(self.waiting)
            self.waiting.clear()

    def _opened(self):
        return self.path.open("a", encoding="utf-8")
