"""DICOM series made of volumes, with a patient's name, birth date and number that must not leak."""

import zipfile
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

LPS = np.array([-1.0, -1.0, 1.0])
NAME, NUMBER, BORN = "Mustermann^Erika", "PAT4711", "19610824"
T2 = {"SeriesDescription": "t2_tse_tra", "EchoTime": 100, "RepetitionTime": 6000}
T1 = {"SeriesDescription": "t1_mprage_sag", "EchoTime": 3, "RepetitionTime": 1900}
FLAIR = {**T2, "SeriesDescription": "flair_tra", "InversionTime": 2500}
LOCALIZER = {"SeriesDescription": "localizer", "EchoTime": 4, "RepetitionTime": 8}


def _common(kind, study, series, number, tags):
    """A data set with the patient, the study and the series."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = kind
    made.SOPInstanceUID = generate_uid()
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.PatientName, made.PatientID, made.PatientBirthDate = NAME, NUMBER, BORN
    made.ImageComments = f"{NAME} {BORN}"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.SeriesNumber = study, series, number
    made.FrameOfReferenceUID = study
    made.Modality, made.Manufacturer = "MR", "SIEMENS"
    made.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    made.ScanningSequence, made.MRAcquisitionType = "SE", "2D"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 0
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def _save(made, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)


def _plane(affine):
    """(6 cosines, 2 spacings, spacing of slices) of voxels [i, j, k]: j are rows, i columns."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    across, down = ((affine[:3, axis] / sizes[axis] * LPS).tolist() for axis in (0, 1))
    return [*across, *down], [float(sizes[1]), float(sizes[0])], float(sizes[2])


def write_series(
    folder, values, affine, *, number=1, study=None, name="IM{:04}", slices=None, **tags
):
    """Write a volume [i, j, k] of whole numbers slice by slice; returns the folder.

    Args:
        study: its UID; by default a new one.
        name: of the files, with a place for the number of the slice.
        slices: those to write; by default all.
        tags: of every image, in place of those of a T2 series; None leaves one out.
    """
    study, series = study or generate_uid(), generate_uid()
    cosines, spacing, thickness = _plane(affine)
    tags = {keyword: value for keyword, value in {**T2, **tags}.items() if value is not None}
    for k in range(values.shape[2]) if slices is None else slices:
        made = _common(MRImageStorage, study, series, number, tags)
        made.InstanceNumber = k + 1
        made.Rows, made.Columns = values.shape[1], values.shape[0]
        made.PixelSpacing, made.SliceThickness = spacing, thickness
        made.ImageOrientationPatient = cosines
        made.ImagePositionPatient = ((affine @ [0, 0, k, 1])[:3] * LPS).tolist()
        made.PixelData = values[:, :, k].T.astype("<u2").tobytes()
        _save(made, Path(folder) / name.format(k))
    return Path(folder)


def write_multiframe(path, values, affine, *, number=1, **tags):
    """Write a volume as one enhanced MR image."""
    tags = {**T2, **tags}
    echo, repetition = tags.pop("EchoTime"), tags.pop("RepetitionTime")
    cosines, spacing, thickness = _plane(affine)
    made = _common(EnhancedMRImageStorage, generate_uid(), generate_uid(), number, tags)
    made.Rows, made.Columns, made.NumberOfFrames = values.shape[1], values.shape[0], values.shape[2]
    made.SharedFunctionalGroupsSequence = [
        _group(
            MREchoSequence={"EffectiveEchoTime": echo},
            MRTimingAndRelatedParametersSequence={"RepetitionTime": repetition},
            PlaneOrientationSequence={"ImageOrientationPatient": cosines},
            PixelMeasuresSequence={"PixelSpacing": spacing, "SliceThickness": thickness},
        )
    ]
    made.PerFrameFunctionalGroupsSequence = [
        _group(
            PlanePositionSequence={
                "ImagePositionPatient": ((affine @ [0, 0, k, 1])[:3] * LPS).tolist()
            },
            FrameContentSequence={"InStackPositionNumber": k + 1, "StackID": "1"},
        )
        for k in range(values.shape[2])
    ]
    made.PixelData = np.moveaxis(values, (0, 1, 2), (2, 1, 0)).astype("<u2").tobytes()
    _save(made, Path(path))
    return Path(path)


def _group(**sequences):
    group = Dataset()
    for keyword, values in sequences.items():
        item = Dataset()
        for inner, value in values.items():
            setattr(item, inner, value)
        setattr(group, keyword, [item])
    return group


def zipped(folder, path, *, above=""):
    """A zip of a folder's files, below the folder `above` in it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                archive.write(file, str(Path(above) / file.relative_to(folder)))
    return Path(path)
