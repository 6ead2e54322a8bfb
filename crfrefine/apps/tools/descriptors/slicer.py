"""The description of `infer` for one case in the Slicer Execution Model: 3D Slicer and MITK make a panel of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata
from xml.etree import ElementTree

import crfrefine
from crfrefine.apps.tools.descriptors.command import Command, Option
from crfrefine.parameters.presets import list_presets, purpose_of

# Of many cases, or files beside the result, which a viewer does not see.
LEFT_OUT = frozenset(
    {
        *("nnunet", "manifest", "resume", "num_parts", "part_id", "fail_fast", "summary", "verbose", "quiet"),
        *("save_probabilities", "save_logits", "save_structures", "preview", "dask", "output_format"),
        "allow_mismatched_dicom",
    }
)
"""Options that a viewer is not told of."""

_EXTENSIONS = ".nii.gz,.nii,.nrrd,.nhdr,.mha,.mhd"
_ELEMENTS: dict[str, tuple[str, dict[str, str]]] = {
    "images": ("image", {"type": "scalar", "fileExtensions": _EXTENSIONS}),
    "logits": ("file", {"fileExtensions": f"{_EXTENSIONS},.npz"}),
    "output": ("image", {"type": "label", "fileExtensions": _EXTENSIONS}),
    "masks": ("image", {"type": "label", "fileExtensions": _EXTENSIONS}),
    "config_file": ("file", {"fileExtensions": ".toml"}),
}
"""How files are chosen: images from the scene, logits from the disk, since the scene has no place for a channel per label."""

_CONFIG_FILE = "--config-file"
_FIRST = ("images", "logits", "output", "masks", "config", "config_file", "input_type")
_WORDS = {
    "images": ("Image", "The scan that was segmented: the borders are moved to its edges. Required."),
    "logits": (
        "Segmentation to refine",
        "The file with what the network made of the image: its scores or probabilities of all labels, or its label map. "
        "It is chosen from the disk, as a scene cannot hold scores. Required.",
    ),
    "output": ("Refined segmentation", "Where the result goes. Required."),
    "masks": ("Mask", "Voxels outside keep the label that the network gave them. None: the whole image is refined."),
    "config": ("Preset", "What is in the image."),
    "config_file": ("Parameter file", "A file that a training has written, or that you have saved. It replaces the preset."),
    "input_type": (
        "The segmentation holds",
        "Scores (logits), probabilities or a label map (labels); auto finds out and says what it took.",
    ),
    "overrides": (
        "Changed parameters",
        "Such as bilateral.theta_alpha=3, in place of the preset's value; several with commas between them.",
    ),
    "regions": ("Regions", "Only for networks with overlapping regions: such as whole=1+2+3, in the order of the network's channels."),
    "regions_class_order": ("Labels of the regions", "Only with regions: the label that each of them gets, such as 1,2,3."),
    "resample": ("Segmentation on another grid", "Interpolate a segmentation or mask whose voxels are not those of the image."),
    "device": ("Compute on", "auto; cpu: the processor; cuda: the graphics card."),
    "threads": ("Threads", "How many cores of the processor may work. Empty: all that are free to use."),
    "max_memory": ("Most memory", "Such as 8GiB. Empty: what the system allows."),
}
"""Label and description in the panel, for people who click; another option has those of the command."""


def slicer_xml(command: Command) -> str:
    """Return the XML that an executable prints for `--xml`.

    Long flags have underscores where the command has hyphens: CTK's schema allows letters, digits and underscores alone.

    Source: the documentation of the Slicer Execution Model; CTK's ctkCmdLineModule.xsd.
    """
    root = ElementTree.Element("executable")
    for tag, text in (
        ("category", "Segmentation"),
        ("title", "Refine segmentation (dense CRF)"),
        (
            "description",
            "Moves the borders of a network's segmentation to the edges of the image. It takes an image and the network's output.",
        ),
        ("version", crfrefine.__version__),
        ("documentation-url", _documentation()),
        ("license", "Apache-2.0"),
    ):
        if text:
            _add(root, tag, text)
    shown = {option.name: option for option in command.options if option.name not in LEFT_OUT}
    if "config" in shown:
        presets = tuple(list_presets())
        shown["config_file"] = replace(shown["config"], name="config_file", flag=_CONFIG_FILE, kind="input", default=None)
        shown["config"] = replace(shown["config"], choices=presets)
    first = [shown.pop(name) for name in _FIRST if name in shown]
    if first:
        _group(root, "Case", "What is refined, and for which kind of image.", first)
    if shown:
        _group(root, "More options", "All of them may stay as they are.", list(shown.values()), advanced="true")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def infer_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `infer` for those that a viewer gives: hyphens in options, and none of the options left empty.

    A file of parameters comes after the preset, so it wins.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "" and found and found[-1].startswith("--"):
            found.pop()
        elif argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            flag = flag.replace("_", "-")
            found.append(("--config" if flag == _CONFIG_FILE else flag) + equals + value)
        else:
            found.append(argument)
    return found


def _documentation() -> str:
    """Return the address of the documentation; empty if the installed package states none."""
    try:
        stated = metadata("crfrefine").get_all("Project-URL") or []
    except PackageNotFoundError:  # A source tree that is not installed.
        return ""
    addresses: dict[str, str] = dict(text.split(", ", 1) for text in stated if ", " in text)
    return addresses.get("Documentation", addresses.get("Homepage", ""))


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
    label, description = _WORDS.get(option.name, (option.name.replace("_", " ").capitalize(), option.help))
    if option.name == "config":
        description += "".join(f"\n{preset}: {purpose_of(preset)}." for preset in option.choices)
    _add(element, "name", option.name)
    _add(element, "longflag", "--" + option.flag.removeprefix("--").replace("-", "_"))
    _add(element, "description", description)
    _add(element, "label", label)
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
