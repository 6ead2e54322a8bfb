"""Commands and options that are gone, with what does their job now."""

GONE = {
    "describe": "`describe` is gone: `crfrefine COMMAND --help` lists the options of a command",
}
"""Name of the command or option, such as "describe" or "--workers", to the sentence that its user gets."""
