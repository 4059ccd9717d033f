"""Scans as scanners send them: which of many DICOM files are the T2 series, and that as NIfTI.

`files` reads a folder or a zip, `headers` what each image says of itself, `series` puts images
together and knows what a series is, `choice` finds the one to take, `convert` makes NIfTI of it.
Patients' names, birth dates and numbers stay in `headers`: nothing of them is kept or written.
"""
