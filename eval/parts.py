"""Parts of a long experiment: each in a folder of its own, made once, found again by its settings.

The folder's name ends in a hash of the settings and of everything the part is made from, so that a
changed setting makes a new part and all others are reused. A part is finished when its folder holds
`done.json`; a killed one goes on in the same folder.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_lesion import __version__
from tf_lesion.files import write_json

KEY_DIGITS = 10
DONE = "done.json"
REFERENCE_PIXELS = 158 * 198
# Seconds for one slice and one step at 158 x 198 pixels on two cores; rough, for the first estimate
# only. Later ones use the times of finished parts.
SECONDS_PER_SLICE_STEP = {
    "training": 0.033,
    "restoration": 0.037,
    "restoration in bfloat16": 0.021,
}


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes:
        kind: key of `SECONDS_PER_SLICE_STEP`, also with more words after it, or "" for the little
            that is left.
        slice_steps: slices times steps.
        pixels: of one slice.
    """

    kind: str = ""
    slice_steps: int = 0
    pixels: int = REFERENCE_PIXELS

    @property
    def size(self) -> float:
        """Slice-steps of 158 x 198 pixels."""
        return self.slice_steps * self.pixels / REFERENCE_PIXELS


NO_WORK = Work()


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        root: folder of all parts.
        name: what it makes, for people.
        settings: JSON-serialisable; with `needs` they decide what is made.
        make: called with the folder, which may hold what a killed run has left.
        needs: parts that must be finished before; what made them decides what is made.
        after: parts that must be finished before; what of them matters is in the settings.
        work: for the estimate.
    """

    root: Path
    name: str
    settings: dict[str, Any]
    make: Callable[[Path], None]
    needs: tuple["Part", ...] = ()
    after: tuple["Part", ...] = ()
    work: Work = NO_WORK

    @functools.cached_property
    def key(self) -> str:
        """Hash of the settings and of the parts it is made from."""
        content = [__version__, self.name, self.settings, [part.key for part in self.needs]]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]

    @property
    def folder(self) -> Path:
        """Where it is made."""
        return self.root / f"{self.name}-{self.key}"

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / DONE).exists()

    def ensure(self) -> Path:
        """Make it, and before that what it needs, unless it is finished; returns its folder."""
        if self.done:
            return self.folder
        for part in (*self.needs, *self.after):
            part.ensure()
        print(f"-> {self.name}: {self.folder}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        self.make(self.folder)
        write_json(
            self.folder / DONE,
            {
                "tf_lesion_version": __version__,
                "settings": self.settings,
                "made_from": [part.folder.name for part in self.needs],
                "seconds": round(time.time() - started, 1),
                "kind": self.work.kind,
                "size": self.work.size,
            },
        )
        return self.folder


def fingerprint(path: str | Path) -> list:
    """What tells a file from another version of it: path, size and time; JSON-serialisable."""
    path = Path(path)
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def with_needs(parts: Iterable[Part]) -> list[Part]:
    """The parts and all that they need, each once, in the order of making."""
    found = {}
    for part in parts:
        for each in (*with_needs((*part.needs, *part.after)), part):
            found.setdefault(each.folder, each)
    return list(found.values())


def measured_rates(root: str | Path) -> dict[str, float]:
    """{kind: seconds per slice-step of 158 x 198} of the finished parts under `root`."""
    seconds, sizes = {}, {}
    for path in Path(root).glob(f"*/{DONE}"):
        done = json.loads(path.read_text())
        if done["kind"] and done["size"]:
            seconds[done["kind"]] = seconds.get(done["kind"], 0.0) + done["seconds"]
            sizes[done["kind"]] = sizes.get(done["kind"], 0.0) + done["size"]
    return {kind: seconds[kind] / sizes[kind] for kind in sizes}


def _rate(kind, rates):
    """That of the kind, or of the longest known one that it begins with; 0 without."""
    known = [each for each in rates if kind.startswith(each)]
    return rates[max(known, key=len)] if known else 0.0


def plan(parts: Iterable[Part], root: str | Path) -> str:
    """Text: every part, whether it is finished, and about how long the others take."""
    rates = SECONDS_PER_SLICE_STEP | measured_rates(root)
    lines, left = [], 0.0
    for part in with_needs(parts):
        seconds = 0.0 if part.done else part.work.size * _rate(part.work.kind, rates)
        left += seconds
        state = "finished" if part.done else f"about {seconds / 60:.1f} min"
        lines.append(
            f"{part.name:32} {part.key}  {part.work.slice_steps:>12,} slice-steps  {state}"
        )
    missing = sum(not part.done for part in with_needs(parts))
    lines.append(f"{missing} of {len(lines)} parts are left, about {left / 60:.0f} min.")
    return "\n".join(lines)
