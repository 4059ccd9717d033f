"""Parts of a long experiment: each in a folder of its own, made once, found again by its settings.

The folder's name ends in a hash of the settings and of everything the part is made from, so that a
changed setting makes a new part and all others are reused. A part is finished when its folder holds
`done.json`; a killed one goes on in the same folder.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_lesion import __version__
from tf_lesion.files import InputError, write_json

KEY_DIGITS = 10
DONE = "done.json"
# Seconds for one slice and one step at 158 x 198 pixels on two cores; rough, for the first estimate
# only. Later ones use the times of finished parts.
SECONDS_PER_SLICE_STEP = {
    "training": 0.033,
    "restoration": 0.037,
    "restoration in bfloat16": 0.021,
}


class StoppedError(RuntimeError):
    """Training was stopped by a signal and has saved its state."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}; the same command goes on")
        self.signal = signal


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        root: folder of all parts.
        name: what it makes, for people.
        settings: JSON-serializable; with `needs` they decide what is made.
        make: called with the folder, which may hold what a killed run has left.
        needs: parts that must be finished before; what made them decides what is made.
        after: parts that must be finished before; what of them matters is in the settings.
        kind: of the work, a key of `SECONDS_PER_SLICE_STEP`, also with more words after it.
        slice_steps: how much there is to do: slices times steps.
    """

    root: Path
    name: str
    settings: dict[str, Any]
    make: Callable[[Path], None]
    needs: tuple["Part", ...] = ()
    after: tuple["Part", ...] = ()
    kind: str = ""
    slice_steps: int = 0

    @functools.cached_property
    def folder(self) -> Path:
        """Where it is made."""
        needs = [part.folder.name for part in self.needs]
        text = json.dumps([__version__, self.name, self.settings, needs], sort_keys=True)
        return self.root / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]}"

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / DONE).exists()

    def with_needs(self) -> dict[Path, "Part"]:
        """It and all that must be finished before, by folder, in the order of making."""
        found = {}
        for part in (*self.needs, *self.after):
            found |= part.with_needs()
        return {**found, self.folder: self}

    def ensure(self) -> None:
        """Make it, and before that what it needs, unless it is finished."""
        if self.done:
            return
        for part in (*self.needs, *self.after):
            part.ensure()
        print(f"-> {self.name}: {self.folder}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        self.make(self.folder)
        content = {"settings": self.settings, "made_from": [p.folder.name for p in self.needs]}
        content |= {"kind": self.kind, "slice_steps": self.slice_steps}
        content |= {"seconds": round(time.time() - started, 1), "tf_lesion_version": __version__}
        write_json(self.folder / DONE, content)


@contextlib.contextmanager
def written_by_us(path: Path, otherwise: str) -> Iterator[None]:
    """Whatever reading JSON of another kind raises becomes an `InputError` that says what to do."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Expected {path} as eval.tables writes it ({error!r}); {otherwise}."
        ) from error


def measured_rates(root: str | Path) -> dict[str, float]:
    """{kind: seconds per slice-step} of the finished parts under `root`."""
    seconds, work = {}, {}
    for path in Path(root).glob(f"*/{DONE}"):
        with written_by_us(path, f"remove {path.parent}, which is then made again"):
            part = json.loads(path.read_text(encoding="utf-8"))
            if part.get("slice_steps"):  # earlier versions have none
                kind = part["kind"]
                seconds[kind] = seconds.get(kind, 0.0) + part["seconds"]
                work[kind] = work.get(kind, 0) + part["slice_steps"]
    return {kind: seconds[kind] / work[kind] for kind in work}


def plan(parts: Iterable[Part], root: str | Path) -> str:
    """Text: every part, whether it is finished, and about how long the others take."""
    rates = SECONDS_PER_SLICE_STEP | measured_rates(root)
    every = {folder: each for part in parts for folder, each in part.with_needs().items()}
    lines, left = [], 0.0
    for part in every.values():
        known = max((k for k in rates if part.kind.startswith(k)), key=len, default=None)
        seconds = 0.0 if part.done or known is None else part.slice_steps * rates[known]
        left += seconds
        state = "finished" if part.done else f"about {seconds / 60:.1f} min"
        key = part.folder.name[-KEY_DIGITS:]
        lines.append(f"{part.name:32} {key}  {part.slice_steps:>12,} slice-steps  {state}")
    missing = sum(not part.done for part in every.values())
    return "\n".join(
        [*lines, f"{missing} of {len(lines)} parts are left, about {left / 60:.0f} min."]
    )
