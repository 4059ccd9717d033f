"""The files of restored scans, plain or BIDS derivatives: names, writing, reading the JSON."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_lesion.files import (
    NUMBER,
    PARTIAL,
    content_identity,
    file_name,
    read_json,
    readable,
    refuse_existing,
    write_json,
    write_text,
)
from tf_lesion.scans import discovery, picture
from tf_lesion.scans.dicom.series import Series
from tf_lesion.scans.discovery import BIDS_SUBJECT, Subject
from tf_lesion.scans.volumes import ScanSource, save_like

SUMMARY = "summary.json"
SCAN_TABLE = "scans.csv"
SCAN = "scan"  # a scan that was converted from DICOM, beside its maps
FACTS_PATTERNS = ("*_restoration.json", "*_desc-*restored_T2w.json")  # plain, BIDS
DESCRIPTIONS = {
    "restored": "restored towards healthy",
    "residual": "abs(observed - restored) on the grid of the model",
    "score": "the residual, post-processed",
    "uncertainty": "standard deviation over the restorations",
    "normalized": "intensities as the model was trained on",
    SCAN: "the scan, converted from DICOM",
}
# A map among the scans, and the JSON that proves it one.
IMAGES = "|".join(DESCRIPTIONS)
PLAIN_MAP = re.compile(rf"(?P<start>.+)_({IMAGES}|brain|(lesions|labels)_fpr_[0-9.]+)")
BIDS_MAP = re.compile(rf"(?P<start>.+_desc-[A-Za-z0-9+]*?)({IMAGES})_T2w")
DONE, SKIPPED, FAILED = "done", "skipped", "failed"
WRITER = "restore_brats.py"
# Of the JSON: what is read of all, and what is told of a scan besides.
FACTS = {
    "name": str,
    "input": str | None,
    "truth?": str | None,
    "files": {"*": str},
    "tables?": {"*": str},
    "lesions": {"*": {"target_fpr": NUMBER, "threshold": NUMBER, "unit?": str}},
}
MORE_FACTS = {
    **dict.fromkeys(("command", "tf_lesion_version", "model", "precision"), str),
    **dict.fromkeys(("commit", "model_path", "model_identity"), str | None),
    **dict.fromkeys(("seed", "slice_step", "slices_restored"), int),
    **dict.fromkeys(("brain_ml", "examined_fraction", "atlas_overlap"), NUMBER),
    **dict.fromkeys(("mutual_information", "histogram_distance", "tv_weight?"), NUMBER | None),
    "versions": {"*": str},
    "scan_settings": {"align": str},
    "scan": {"shape": [int], "voxel_sizes_mm": [NUMBER], "orientation": str},
    "warnings": [str],
    "qc?": {"verdict": str, "reasons": [str], "picture?": str},
    "lesions": {
        "*": {
            **FACTS["lesions"]["*"],
            **dict.fromkeys(("healthy_fpr", "volume_ml", "count", "largest_ml"), NUMBER),
        }
    },
}
SUMMARY_FORM = {"scans": [dict.fromkeys(("name", "reason", "status", "facts", "input?"), str)]}
BIDS_SCAN = re.compile(
    r"(?P<entities>sub-[A-Za-z0-9+]+(_[a-z]+-[A-Za-z0-9+]+)*)_[A-Za-z0-9]+"  # sub-01_ses-1_T2w
)
BIDS_SESSION = re.compile(r"_(ses-[A-Za-z0-9+]+)")
BIDS_DESC = re.compile(r"_desc-([A-Za-z0-9+]+)")


@dataclass(frozen=True)
class Layout:
    """Where the files of one scan go.

    Attributes:
        folder: of all of them.
        prefix: what their names begin with.
        bids: names as in BIDS derivatives.
        desc: what the scan's own name describes it as; a name has one description.
    """

    folder: Path
    prefix: str
    bids: bool = False
    desc: str = ""

    @property
    def facts(self) -> Path:
        """The JSON; in BIDS it is the sidecar of the restored scan."""
        ending = f"desc-{self.desc}restored_T2w.json" if self.bids else "restoration.json"
        return self.folder / f"{self.prefix}_{ending}"

    @property
    def picture(self) -> Path:
        """The picture for quality control: brain and alignment in three planes, histograms."""
        return self.folder / f"{self.prefix}_qc.png"

    @property
    def lesions(self) -> Path:
        """The table of the lesions."""
        return self.folder / f"{self.prefix}_lesions.csv"

    @property
    def begun(self) -> Path:
        """The JSON as it is called until all files are there; what lies beside it is ours."""
        return self.facts.with_name(f"{self.facts.name}.{PARTIAL}")

    def files(self, names: Iterable[str], subject: Subject | None = None) -> list[Path]:
        """All files of a scan with these volumes; the JSON, which is written last, is the last."""
        volumes = self.volumes(names, subject).values()
        sidecars = map(_sidecar_of, volumes) if self.bids else ()
        return [*volumes, *sidecars, self.lesions, self.picture, self.facts]

    def refuse_existing(
        self, names: Iterable[str], subject: Subject | None = None, *, force: bool
    ) -> None:
        """Raise `FileExistsError` for one of the `files`, unless an unfinished run left it."""
        for path in self.files(names, subject):
            refuse_existing(path, force=force or self.begun.exists())

    def begin(self) -> None:
        """To be called before the first file is written: from then on the JSON vouches for none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts.replace(self.begun) if self.facts.exists() else self.begun.touch()

    def volume(self, name: str) -> Path:
        """The NIfTI file of a volume of `maps.ScanMaps`."""
        return self.folder / f"{self.prefix}_{self._label(name)}.nii.gz"

    def _label(self, name):
        kind, of_threshold, rate = name.rpartition("fpr_")
        if not self.bids:
            return f"lesions_{name}" if of_threshold and not kind else name
        if name == "brain":
            return f"desc-{self.desc}brain_mask"
        if name in DESCRIPTIONS:
            return f"desc-{self.desc}{name}_T2w"
        desc = f"desc-{self.desc}fpr{rate.removeprefix('0.').ljust(2, '0')}"
        return f"{desc}_dseg" if kind else f"label-lesion_{desc}_mask"

    def volumes(self, names: Iterable[str], subject: Subject | None = None) -> dict[str, Path]:
        """{name: path} of these volumes, and of the scan itself where that is no NIfTI."""
        of_scan = (SCAN,) if subject and subject.series is not None else ()
        return {name: self.volume(name) for name in (*names, *of_scan)}


def stem_of(path: str | Path) -> str:
    """File name without `.nii`, `.nii.gz` or `.zip`."""
    name = Path(path).name or Path(path).resolve().name  # of the folder "."
    return re.sub(r"\.zip$", "", discovery.ENDING.sub("", name), flags=re.I)


def read_facts(path: str | Path, *, whole: bool = False) -> dict[str, Any]:
    """The facts of a restored scan: `FACTS` at least, if `whole` with `MORE_FACTS`.

    Raises:
        InputError: if the file holds none.
    """
    return read_json(path, FACTS | MORE_FACTS if whole else FACTS, writer=WRITER)


def read_summary(folder: str | Path) -> list[dict[str, str]]:
    """The rows of the summary in a folder of maps, a scan each; [] without one.

    Raises:
        InputError: if the file is another.
    """
    path = Path(folder) / SUMMARY
    return read_json(path, SUMMARY_FORM, writer=WRITER)["scans"] if path.exists() else []


def one_scan(path: str | Path, *, mask: str | Path | None = None) -> Subject:
    """The `Subject` of a single scan, with the segmentation of the BRATS layout if it is there."""
    path = Path(path)
    label, given = discovery.segmentation_beside(path), [path, *([Path(mask)] if mask else [])]
    problem = next(filter(None, map(discovery.problem_of, given)), "")
    return Subject(readable(name_of(path)), path, mask=mask, label=label, problem=problem)


def is_map(path: Path) -> bool:
    """Whether a file is a map that `save_maps` wrote, to judge by its name and the JSON beside."""
    plain, bids = (form.fullmatch(stem_of(path)) for form in (PLAIN_MAP, BIDS_MAP))
    told = [f"{plain['start']}_restoration.json"] if plain else []
    told += [f"{bids['start']}restored_T2w.json"] if bids else []
    told += [f"{name}.{PARTIAL}" for name in told]  # of a run that was killed
    return any(path.with_name(name).exists() for name in told)


def name_of(scan: Path, otherwise: str | None = None) -> str:
    """The BIDS entities of a scan's name, all of them: a subject may have many scans.

    Of a file that has none, in the folder of a subject's session, they are those of the folders.
    """
    bids = BIDS_SCAN.fullmatch(stem_of(scan))
    if bids:
        return bids["entities"]
    sessions = [part for part in scan.parts[:-1] if BIDS_SESSION.fullmatch(f"_{part}")]
    if otherwise and sessions and BIDS_SUBJECT.fullmatch(otherwise):
        return f"{otherwise}_{sessions[-1]}"
    return otherwise or stem_of(scan)


def layout_of(
    subject: Subject, out: str | Path, *, bids: bool = False, many: bool = False
) -> Layout:
    """The `Layout` of a subject in the folder `out`: a sub-folder of its own, if there are many."""
    out = Path(out)
    if not bids:
        return Layout(out / file_name(subject.name) if many else out, stem_of(subject.scan))
    entities = subject.name
    if not BIDS_SCAN.fullmatch(f"{entities}_T2w"):
        entities = f"sub-{_bids_label(entities)}"
    session, desc = BIDS_SESSION.search(entities), BIDS_DESC.search(entities)
    folder = out / entities.split("_")[0] / (session[1] if session else "") / "anat"
    own = desc[1] if desc else ""
    return Layout(folder, BIDS_DESC.sub("", entities), bids=True, desc=own)


def _bids_label(name):
    """The ASCII letters and digits of a name, and the numbers in Unicode of what is not ASCII."""
    kept = (c if c.isascii() else f"{ord(c):x}" for c in name if c.isalnum() or not c.isascii())
    return "".join(kept) or SCAN


def scan_of(facts_path: str | Path, facts: dict[str, Any]) -> tuple[Path, str | None]:
    """(path of the scan as NIfTI, identity of its content), as the facts have it."""
    if SCAN in facts["files"]:
        return Path(facts_path).parent / facts["files"][SCAN], facts.get("scan_file_identity")
    identity = facts.get("input_identity")  # unknown to versions before
    return Path(facts["input"] or "image in memory"), identity


def absolute(path: ScanSource | None) -> str | None:
    """The whole path of a file, or of the folder of a series; None for an image in memory."""
    if isinstance(path, Series):
        path = path.path
    return str(Path(path).resolve()) if isinstance(path, str | Path) else None


def told_of(name: str, source: ScanSource | None) -> dict[str, str | None]:
    """What facts say of a file: its whole path as `name`, and the identity of its content."""
    path = absolute(source)
    if isinstance(source, Series):
        return {name: path, f"{name}_identity": source.identity}
    return {name: path, f"{name}_identity": content_identity(path) if path else None}


def save_maps(
    maps: Any,
    subject: Subject,
    layout: Layout,
    *,
    command: str = "",
    force: bool = False,
) -> dict[str, Any]:
    """Write the files of a scan, the JSON last; returns the facts, with what is known of it.

    Args:
        maps: `ScanMaps`.
        subject: the scan's `Subject`.
        layout: `Layout`.
        command: the command line, for the facts.
        force: overwrite.
    """
    volumes = dict(maps.volumes)
    if maps.prepared.scan.series is not None:
        volumes[SCAN] = maps.prepared.scan.as_stored()
    paths = layout.volumes(volumes)
    layout.refuse_existing(volumes, force=force)
    layout.begin()
    for volume, path in paths.items():
        save_like(maps.prepared.scan, volumes[volume], path)
    write_text(layout.lesions, maps.lesions.to_csv(index=False))
    picture.write_picture(layout.picture, maps.prepared, maps.facts["qc"])
    facts = {
        "name": subject.name,
        "command": command,
        **maps.facts,
        "truth": subject.label and os.path.abspath(subject.label),  # a link stays one
        "files": {volume: path.name for volume, path in paths.items()},
        "tables": {"lesions": layout.lesions.name},
        "qc": {**maps.facts["qc"], "picture": layout.picture.name},
    }
    if SCAN in paths:
        facts["scan_file_identity"] = content_identity(paths[SCAN])
    if layout.bids:
        facts |= _write_sidecars(paths, facts)
    write_json(layout.begun, facts)
    layout.begun.replace(layout.facts)
    return facts


def _write_sidecars(paths, facts):
    """Write the JSON beside each volume but the first; returns the fields of that one."""
    common = {"Sources": [Path(facts["input"]).as_uri()], "SpatialReference": "orig"}
    what = {
        name: {"Description": about, "SkullStripped": name != SCAN}
        for name, about in DESCRIPTIONS.items()
    }
    what["brain"] = {"Type": "Brain"}
    for name, lesions in facts["lesions"].items():
        about = f"{lesions['of']} above the threshold that a share of healthy voxels exceeds"
        what[name] = {"Type": "Lesion", "Description": about, **lesions}
        what[f"labels_{name}"] = {"Description": f"lesions of {paths[name].name}, numbered"}
    for name in list(paths)[1:]:
        write_json(_sidecar_of(paths[name]), {**common, **what[name]})
    return {**common, **what["restored"]}


def _sidecar_of(volume):
    return volume.with_name(f"{stem_of(volume)}.json")
