"""Commands and options that are gone, with what does their job now."""

GONE = {
    "--allow-mismatched-dicom": "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, and no other command does",
}
"""Name of the command or option, such as "describe" or "--workers", to the sentence that its user gets."""
