"""The description of `infer` for one case in the Slicer Execution Model: 3D Slicer and MITK make a panel of it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

import crfrefine
from crfrefine.tools.descriptors.command import Command, Option

# Of many cases, or files beside the result, which a viewer does not see.
LEFT_OUT = frozenset(
    {
        *("nnunet", "manifest", "resume", "num_parts", "part_id", "fail_fast", "summary", "verbose", "quiet"),
        *("save_probabilities", "save_logits", "save_structures", "preview", "workers", "dask", "allow_mismatched_dicom"),
    }
)
"""Options that a viewer is not told of."""

_EXTENSIONS = ".nii.gz,.nii,.nrrd,.nhdr,.mha,.mhd"
_ELEMENTS: dict[str, tuple[str, dict[str, str]]] = {
    "images": ("image", {"type": "scalar", "fileExtensions": _EXTENSIONS}),
    "logits": ("file", {"fileExtensions": f"{_EXTENSIONS},.npz"}),
    "output": ("image", {"type": "label", "fileExtensions": _EXTENSIONS}),
    "masks": ("image", {"type": "label", "fileExtensions": _EXTENSIONS}),
}
"""How files are chosen: images from the scene, logits from the disk, since the scene has no place for a channel per label."""

_FIRST = ("images", "logits", "output", "masks", "config", "input_type")
_REQUIRED = ("images", "logits", "output")


def slicer_xml(command: Command) -> str:
    """Return the XML that an executable prints for `--xml`.

    Long flags have underscores where the command has hyphens: CTK's schema allows letters, digits and underscores alone.

    Source: the documentation of the Slicer Execution Model; CTK's ctkCmdLineModule.xsd.
    """
    root = ElementTree.Element("executable")
    for tag, text in (
        ("category", "Segmentation"),
        ("title", "Refine segmentation (dense CRF)"),
        ("description", f"{command.help} Here: one case, with one image of the scene and the network's logits or label map in a file."),
        ("version", crfrefine.__version__),
        ("license", "Apache-2.0"),
    ):
        _add(root, tag, text)
    shown = {option.name: option for option in command.options if option.name not in LEFT_OUT}
    first = [shown.pop(name) for name in _FIRST if name in shown]
    if first:
        _group(root, "Case", "What is refined, and by which parameters.", first)
    if shown:
        _group(root, "More options", "All of them may stay as they are.", list(shown.values()), advanced="true")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def infer_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `infer` for those that a viewer gives: hyphens in options, and none of the options left empty."""
    found: list[str] = []
    for argument in arguments:
        if argument == "" and found and found[-1].startswith("--"):
            found.pop()
        elif argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            found.append(flag.replace("_", "-") + equals + value)
        else:
            found.append(argument)
    return found


def _group(root: ElementTree.Element, label: str, description: str, options: Sequence[Option], **attributes: str) -> None:
    group = ElementTree.SubElement(root, "parameters", attributes)
    _add(group, "label", label)
    _add(group, "description", description)
    for option in options:
        _parameter(group, option)


def _parameter(group: ElementTree.Element, option: Option) -> None:
    tag, attributes = _ELEMENTS.get(option.name, (_tag(option), {}))
    if tag in ("string", "file") and option.is_repeatable and option.name not in _ELEMENTS:
        attributes = {"multiple": "true"}
    element = ElementTree.SubElement(group, tag, attributes)
    needed = " Required." if option.name in _REQUIRED else ""
    _add(element, "name", option.name)
    _add(element, "longflag", "--" + option.flag.removeprefix("--").replace("-", "_"))
    _add(element, "description", option.help + needed)
    _add(element, "label", option.name.replace("_", " ").capitalize())
    if tag == "boolean":
        _add(element, "default", "false")
    elif option.default is not None:
        _add(element, "default", option.default)
    if tag in ("image", "file", "directory"):
        _add(element, "channel", "output" if option.kind == "output" else "input")
    for choice in option.choices:
        _add(element, "element", choice)
    if tag in ("integer", "double") and (option.minimum is not None or option.maximum is not None):
        limits = ElementTree.SubElement(element, "constraints")
        for name, limit in (("minimum", option.minimum), ("maximum", option.maximum)):
            if limit is not None:
                _add(limits, name, f"{limit:g}")
        _add(limits, "step", "1" if tag == "integer" else "0.1")


def _tag(option: Option) -> str:
    """Return the element of an option: a panel shows 0 for a number without default, so such numbers are texts that may be empty."""
    if option.choices:
        return "string-enumeration"
    if option.kind in ("integer", "number") and option.default is None:
        return "string"
    return {"flag": "boolean", "integer": "integer", "number": "double", "text": "string", "input": "file", "output": "file"}[option.kind]


def _add(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = text
