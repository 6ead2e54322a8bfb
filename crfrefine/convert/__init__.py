"""The command `convert`: volumes from one format into another, and DICOM."""
