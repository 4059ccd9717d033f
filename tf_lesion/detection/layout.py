"""Names of the files of restored scans, plain and as BIDS derivatives, and reading their JSON."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_lesion.files import InputError

SUMMARY = "summary.json"
FACTS_ENDINGS = ("_restoration.json", "_desc-restored_T2w.json")  # plain, BIDS
DONE, SKIPPED, FAILED = "done", "skipped", "failed"


@dataclass(frozen=True)
class Layout:
    """Where the files of one scan go.

    Attributes:
        folder: of all of them.
        prefix: what their names begin with.
        bids: names as in BIDS derivatives.
    """

    folder: Path
    prefix: str
    bids: bool = False

    @property
    def facts(self) -> Path:
        """The JSON; in BIDS it is the sidecar of the restored scan."""
        return self.folder / f"{self.prefix}{FACTS_ENDINGS[self.bids]}"

    def volume(self, name: str) -> Path:
        """The NIfTI file of a volume: `restored`, `residual`, `score` or a threshold's name."""
        is_mask = name.startswith("fpr_")
        if self.bids:
            rate = name.removeprefix("fpr_0.").ljust(2, "0")
            label = f"label-lesion_desc-fpr{rate}_mask" if is_mask else f"desc-{name}_T2w"
        else:
            label = f"lesions_{name}" if is_mask else name
        return self.folder / f"{self.prefix}_{label}.nii.gz"

    def volumes(self, names: Iterable[str]) -> dict[str, Path]:
        """{name: path} of these volumes."""
        return {name: self.volume(name) for name in names}


def stem_of(path: str | Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts of a restored scan.

    Raises:
        InputError: if the file holds none.
    """
    try:
        facts = json.loads(Path(path).read_text())
        facts["lesions"], facts["files"], facts["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected {path} as restore_brats.py writes it ({error!r}).") from error
    return facts
