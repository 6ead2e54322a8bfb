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
    if root.tag != "executable":
        return [f"<{root.tag}> is outermost"]
    found = _order([child.tag for child in root], (*_HEAD, "parameters"), ("title", "description", "parameters"), "executable")
    names: list[str] = []
    flags: list[str] = []
    for group in root.findall("parameters"):
        tags = [child.tag for child in group]
        if tags[:2] != ["label", "description"] or not tags[2:]:
            found.append(f"a group has {tags[:3]}")
        if set(group.attrib) - {"advanced"} or group.get("advanced", "true") not in ("true", "false"):
            found.append(f"a group has the attributes {group.attrib}")
        for parameter in group[2:]:
            found += _parameter(parameter)
            names.append(parameter.findtext("name", ""))
            flags.append(parameter.findtext("longflag", ""))
    found += [f"{name} is there twice" for name in {*names, *flags} if (names + flags).count(name) > 1]
    return found


def _parameter(parameter: ElementTree.Element) -> list[str]:
    kind, name = parameter.tag, parameter.findtext("name", "")
    if kind not in _ATTRIBUTES:
        return [f"<{kind}> is no kind of parameter"]
    own = _OF_KIND.get(kind, ())
    found = _order([child.tag for child in parameter], (*_PARAMETER, *own), ("name", "description", "label"), name)
    if not _NAME.fullmatch(name):
        found.append(f"the name {name!r}")
    flag = parameter.findtext("longflag")
    if (flag is None) == (parameter.find("index") is None) or (flag is not None and not _LONGFLAG.fullmatch(flag)):
        found.append(f"{name}: the flag {flag!r}")
    for attribute, value in parameter.attrib.items():
        if attribute not in _ATTRIBUTES[kind]:
            found.append(f"{name}: the attribute {attribute}")
        if attribute == "type" and value not in _IMAGES:
            found.append(f"{name}: the type {value}")
        if attribute == "fileExtensions" and not _EXTENSIONS.fullmatch(value):
            found.append(f"{name}: the extensions {value}")
        if attribute == "multiple" and value not in ("true", "false"):
            found.append(f"{name}: multiple is {value}")
    channel = parameter.findtext("channel")
    if (kind in ("file", "image", "directory")) != (channel is not None) or channel not in (None, "input", "output"):
        found.append(f"{name}: the channel {channel!r}")
    default = parameter.findtext("default")
    if kind == "boolean" and default not in (None, "true", "false"):
        found.append(f"{name}: the default {default!r}")
    choices = [element.text for element in parameter.findall("element")]
    if kind == "string-enumeration" and (not choices or default not in choices):
        found.append(f"{name}: {default!r} is none of {choices}")
    limits = parameter.find("constraints")
    if limits is not None:
        found += _order([child.tag for child in limits], ("minimum", "maximum", "step"), ("step",), f"{name}: constraints")
        [float(child.text or "") for child in limits]
    if kind in ("integer", "double"):
        float(default or "")  # A panel shows some number.
    return found


def _order(tags: list[str], allowed: tuple[str, ...], required: tuple[str, ...], where: str) -> list[str]:
    """Unknown, misplaced, repeated and missing elements."""
    repeatable = {"parameters", "element"}
    found = [f"{where}: <{tag}> is unknown" for tag in tags if tag not in allowed]
    places = [allowed.index(tag) for tag in tags if tag in allowed]
    found += [f"{where}: the order {tags}"] if places != sorted(places) else []
    found += [f"{where}: <{tag}> is there twice" for tag in {*tags} - repeatable if tags.count(tag) > 1]
    return found + [f"{where}: no <{tag}>" for tag in required if tag not in tags]
