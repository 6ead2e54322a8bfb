"""Commands and options that are gone, with what does their job now."""

GONE = {
    "describe": "`describe` is gone: `crfrefine COMMAND --help` lists the options of a command",
    "bids": "`bids` is gone: the script examples/bids.py refines a BIDS dataset with `crfrefine infer --manifest`",
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
}
"""Name of the command or option, such as "describe" or "--workers", to the sentence that its user gets."""
