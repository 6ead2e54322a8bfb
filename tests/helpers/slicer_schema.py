"""The rules of the Slicer Execution Model for the XML of an executable, written down from its documentation and CTK's schema.

It knows the elements that descriptions of this package use, and nothing else: an unknown one is a problem.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

_HEAD = ("category", "title", "description", "version", "documentation-url", "license", "contributor", "acknowledgements")
_PARAMETER = ("name", "flag", "longflag", "index", "description", "label", "default", "channel")
_NAME = re.compile(r"[_a-zA-Z][_a-zA-Z0-9]*")
_LONGFLAG = re.compile(r"-?-?[_a-zA-Z][_a-zA-Z0-9]*")
_EXTENSIONS = re.compile(r"\.[a-z.]+(,\.[a-z.]+)*")
_IMAGES = ("scalar", "label", "tensor", "diffusion-weighted", "vector", "model")
_ATTRIBUTES = {
    "boolean": (),
    "integer": ("multiple",),
    "double": ("multiple",),
    "string": ("multiple",),
    "directory": ("multiple",),
    "string-enumeration": (),
    "file": ("multiple", "fileExtensions"),
    "image": ("multiple", "fileExtensions", "type"),
}
_OF_KIND = {"integer": ("constraints",), "double": ("constraints",), "string-enumeration": ("element",)}


def problems(text: str) -> list[str]:
    """What is wrong with a description; nothing if it may be used."""
    root = ElementTree.fromstring(text.encode())
    found = _order(root, (*_HEAD, "parameters"), ("title", "description", "parameters"))
    found += [] if root.tag == "executable" else [f"<{root.tag}> is outermost"]
    for group in root.findall("parameters"):
        if [child.tag for child in group][:2] != ["label", "description"] or len(group) < 3:
            found.append(f"a group has {[child.tag for child in group][:3]}")
        if not group.attrib.items() <= {("advanced", "true"), ("advanced", "false")}:
            found.append(f"a group has the attributes {group.attrib}")
        for parameter in group[2:]:
            found += [f"{parameter.findtext('name')}: {problem}" for problem in _parameter(parameter)]
    names = [parameter.findtext(tag) for parameter in root.findall("parameters/*[name]") for tag in ("name", "longflag")]
    return found + [f"{name} is there twice" for name in {*names} - {None} if names.count(name) > 1]


def _parameter(parameter: ElementTree.Element) -> list[str]:
    kind, flag, channel, default = parameter.tag, *map(parameter.findtext, ("longflag", "channel", "default"))
    if kind not in _ATTRIBUTES:
        return [f"<{kind}> is no kind of parameter"]
    choices, attributes, limits = (
        [element.text for element in parameter.findall("element")],
        parameter.attrib,
        parameter.find("constraints"),
    )
    has_file = kind in ("file", "image", "directory")
    rules = {
        "the name": _NAME.fullmatch(parameter.findtext("name", "")),
        "the flag": (flag is None) != (parameter.find("index") is None) and (flag is None or _LONGFLAG.fullmatch(flag)),
        "an attribute": {*attributes} <= {*_ATTRIBUTES[kind]},
        "the type": attributes.get("type", "label") in _IMAGES,
        "the extensions": _EXTENSIONS.fullmatch(attributes.get("fileExtensions", ".nii")),
        "multiple": attributes.get("multiple", "true") in ("true", "false"),
        "the channel": channel in (("input", "output") if has_file else (None,)),
        "the default": kind != "boolean" or default in (None, "true", "false"),
        "the choices": kind != "string-enumeration" or default in choices,
    }
    found = _order(parameter, (*_PARAMETER, *_OF_KIND.get(kind, ())), ("name", "description", "label"))
    found += [what for what, is_right in rules.items() if not is_right]
    if limits is not None:
        found += _order(limits, ("minimum", "maximum", "step"), ("step",))
        [float(child.text or "") for child in limits]
    if kind in ("integer", "double"):
        float(default or "")  # A panel shows some number.
    return found


def _order(parent: ElementTree.Element, allowed: tuple[str, ...], required: tuple[str, ...]) -> list[str]:
    """Unknown, misplaced, repeated and missing elements."""
    tags = [child.tag for child in parent]
    places = [allowed.index(tag) for tag in tags if tag in allowed]
    found = [f"<{tag}> is unknown" for tag in tags if tag not in allowed]
    found += [f"the order {tags}"] if places != sorted(places) else []
    found += [f"<{tag}> is there twice" for tag in {*tags} - {"parameters", "element"} if tags.count(tag) > 1]
    return found + [f"no <{tag}>" for tag in required if tag not in tags]
