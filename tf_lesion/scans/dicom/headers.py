"""What a DICOM image says of itself, classic or multi-frame, without its voxels."""

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tf_lesion.files import InputError
from tf_lesion.scans.dicom.files import Files, Reader

EXTRA = "reading DICOM needs the extra dicom: pip install 'tf-lesion[dicom]', or '.[dicom]' here"
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
MACROS = {  # of multi-frame images: keyword -> the sequence that holds it
    "EffectiveEchoTime": "MREchoSequence",
    "RepetitionTime": "MRTimingAndRelatedParametersSequence",
    "InversionTimes": "MRModifierSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "DiffusionBValue": "MRDiffusionSequence",
}
PLAIN = (
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SeriesNumber", "Modality"),
    *("SeriesDescription", "ProtocolName", "ImageType", "ScanningSequence", "MRAcquisitionType"),
    *("EchoTime", "InversionTime", "BodyPartExamined", "Rows", "Columns", "NumberOfFrames"),
    *("BitsAllocated", "SamplesPerPixel", "AcquisitionContrast"),
)
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs")
SHORTEST_NAME = 3  # letters of a part of a name that would be noticed in a description


@dataclass(frozen=True, slots=True)
class Image:
    """One file; times in ms, lengths in mm, NaN and () for what it does not say."""

    name: str = field(repr=False)  # of the file
    size: int = field(repr=False)  # bytes
    study: str = field(repr=False)
    series: str = field(repr=False)
    instance: str = field(repr=False)
    number: int | None
    description: str  # without a part of the patient's name
    words: str = field(repr=False)  # all that names it, lower case: description, protocol, type
    modality: str
    derived: bool
    sequence: tuple[str, ...]  # SE, GR, IR, EP
    is_3d: bool
    echo_time: float
    repetition_time: float
    inversion_time: float
    b_value: float
    body_part: str
    shape: tuple[int, int]  # rows, columns
    spacing: tuple[float, ...]  # mm between rows, between columns
    thickness: float
    orientation: tuple[float, ...]  # 6 cosines
    positions: tuple[tuple[float, ...], ...] = field(repr=False)  # one a frame
    voxel_bytes: int = field(repr=False)  # of all its voxels; 0 if they are compressed


def require_pydicom() -> Any:
    """The module pydicom; `InputError` that names the extra without it."""
    try:
        import pydicom
    except ImportError as error:
        raise InputError(f"Expected pydicom to be installed: {EXTRA}.") from error
    return pydicom


def read_images(files: Files) -> list[Image]:
    """The `Image`s of a folder or zip, each once, in the order of the file names.

    Files that are no DICOM, or hold no image, are left out.
    """
    require_pydicom()
    found: dict[str, Image] = {}
    with files.reader() as reader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that no standard allows, and scanners write
        for name in files.names():
            image = _read(reader, name)
            if image is not None:
                found.setdefault(image.instance or name, image)
    return list(found.values())


def _read(reader: Reader, name: str) -> Image | None:
    """The `Image` of a file; None for one that is none."""
    import pydicom

    tags = [*PLAIN, *PATIENT, *MACROS, *set(MACROS.values()), SHARED, PER_FRAME]
    try:
        if not reader.is_dicom(name):
            return None
        with reader.open(name) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        return image_of(header, name, reader.size(name)) if "Rows" in header else None
    except (InputError, OSError):
        raise
    except Exception as error:  # pydicom has no end of them for files that are damaged
        raise InputError(
            f"{reader.path}: {name} cannot be read as DICOM ({type(error).__name__}); copy it "
            "again, or take it out."
        ) from error


def image_of(header: Any, name: str, size: int) -> Image:
    """The `Image` of a pydicom data set."""
    kind = [str(word).upper() for word in _listed(header.get("ImageType"))]
    said = [str(header.get(key) or "") for key in ("SeriesDescription", "ProtocolName")]
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    frames = int(header.get("NumberOfFrames") or 1)
    number = header.get("SeriesNumber")
    voxels = rows * columns * frames * int(header.get("SamplesPerPixel") or 1)
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    packed = bool(syntax and (syntax.is_compressed or syntax.is_deflated))
    echo = _number(header, "EffectiveEchoTime")
    return Image(
        name=name,
        size=size,
        study=str(header.get("StudyInstanceUID") or ""),
        series=str(header.get("SeriesInstanceUID") or ""),
        instance=str(header.get("SOPInstanceUID") or ""),
        number=None if number is None or number == "" else int(number),
        description=_anonymous(said[0] or said[1], header),
        words=" ".join([*said, *kind]).lower(),
        modality=str(header.get("Modality") or "?"),
        derived="DERIVED" in kind,
        sequence=tuple(map(str, _listed(header.get("ScanningSequence")))),
        is_3d=str(header.get("MRAcquisitionType")) == "3D",
        echo_time=_number(header, "EchoTime") if math.isnan(echo) else echo,
        repetition_time=_number(header, "RepetitionTime"),
        inversion_time=_number(header, "InversionTime", "InversionTimes"),
        b_value=_number(header, "DiffusionBValue"),
        body_part=str(header.get("BodyPartExamined") or ""),
        shape=(rows, columns),
        spacing=tuple(_numbers(header, "PixelSpacing")),
        thickness=_number(header, "SliceThickness"),
        orientation=tuple(_numbers(header, "ImageOrientationPatient")),
        positions=tuple(_positions(header, frames)),
        voxel_bytes=0 if packed else voxels * int(header.get("BitsAllocated") or 0) // 8,
    )


def _positions(header, frames):
    """The position of every frame; of mosaics and others without any, none."""
    if PER_FRAME in header:
        for frame in header[PER_FRAME].value:
            found = _in_macro(frame, "ImagePositionPatient")
            if found is not None:
                yield tuple(map(float, found))
        return
    position = tuple(_numbers(header, "ImagePositionPatient"))
    if len(position) == 3 and frames == 1:
        yield position


def _values(header, keyword) -> Iterator[Any]:
    """What a header says by a keyword: itself, then for all frames, then for the first."""
    yield header.get(keyword)
    for groups in (SHARED, PER_FRAME):
        if groups in header and len(header[groups].value):
            yield _in_macro(header[groups].value[0], keyword)


def _in_macro(group, keyword):
    macro = group.get(MACROS.get(keyword, ""))
    return macro[0].get(keyword) if macro else None


def _numbers(header, keyword):
    for value in _values(header, keyword):
        if value not in (None, "") and len(_listed(value)):
            return [float(one) for one in _listed(value)]
    return []


def _number(header, *keywords):
    for keyword in keywords:
        if found := _numbers(header, keyword):
            return found[0]
    return math.nan


def _listed(value):
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)


def _anonymous(text, header):
    """A description in which nobody wrote the patient's name or number."""
    known = " ".join(str(header.get(keyword) or "") for keyword in PATIENT)
    for part in set(re.split(r"[\W_]+", known)):
        if len(part) >= SHORTEST_NAME:
            text = re.sub(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", "...", text, flags=re.I)
    return " ".join(text.split())
