"""The rules of the Slicer Execution Model for the XML of an executable, written down from its documentation and CTK's schema.

It knows the elements that descriptions of this package use, and nothing else: an unknown one is a problem.
"""

import re
from xml.etree import ElementTree

# Of an executable, of a group, and of a parameter with a default where its kind needs one: the elements in their order.
_EXECUTABLE = r"(category )?title description (version )?(documentation-url )?(license )?(contributor )?(acknowledgements )?(parameters )+"
_GROUP = r"label description (\S+ )+"
_PARAMETER = r"name (flag )?(longflag|index) description label (default )?(channel )?"
_NUMBER = r"name (flag )?(longflag|index) description label default (channel )?(constraints )?"
_CHOICE = r"name (flag )?(longflag|index) description label default (channel )?(element )+"
_LIMITS = r"(minimum )?(maximum )?step "
_NAME = r"[_a-zA-Z][_a-zA-Z0-9]*"
_MANY = {"multiple": r"true|false"}
_FILES = {**_MANY, "fileExtensions": r"\.[a-z.]+(,\.[a-z.]+)*"}
_KINDS = {
    "boolean": (_PARAMETER, {}),
    "integer": (_NUMBER, _MANY),
    "double": (_NUMBER, _MANY),
    "string": (_PARAMETER, _MANY),
    "directory": (_PARAMETER, _MANY),
    "string-enumeration": (_CHOICE, {}),
    "file": (_PARAMETER, _FILES),
    "image": (_PARAMETER, {**_FILES, "type": "scalar|label|tensor|diffusion-weighted|vector|model"}),
}


def problems(text):
    """What is wrong with a description; nothing if it may be used."""
    root = ElementTree.fromstring(text.encode())
    found = [f"<{root.tag}> is outermost"] if root.tag != "executable" else []
    found += _order(root, _EXECUTABLE)
    for group in root.findall("parameters"):
        found += _order(group, _GROUP) + _attributes(group, {"advanced": "true|false"})
        for parameter in group[2:]:
            found += [f"{parameter.findtext('name')}: {problem}" for problem in _parameter(parameter)]
    names = [parameter.findtext(tag) for parameter in root.findall("parameters/*[name]") for tag in ("name", "longflag")]
    return found + [f"{name} is there twice" for name in {*names} - {None} if names.count(name) > 1]


def _parameter(parameter):
    if parameter.tag not in _KINDS:
        return [f"<{parameter.tag}> is no kind of parameter"]
    order, attributes = _KINDS[parameter.tag]
    found = _order(parameter, order) + _attributes(parameter, attributes)
    default, limits, has_file = (
        parameter.findtext("default"),
        parameter.find("constraints"),
        parameter.tag in ("file", "image", "directory"),
    )
    rules = {
        "the name": re.fullmatch(_NAME, parameter.findtext("name", "")),
        "the flag": re.fullmatch(f"-?-?{_NAME}", parameter.findtext("longflag", "a")),
        "the channel": parameter.findtext("channel") in (("input", "output") if has_file else (None,)),
        "the default": parameter.tag != "boolean" or default in (None, "true", "false"),
        "the choices": parameter.tag != "string-enumeration" or default in [choice.text for choice in parameter.findall("element")],
    }
    if parameter.tag in ("integer", "double"):
        [float(number or "") for number in (default, *(child.text for child in (limits if limits is not None else ())))]
    return found + [what for what, is_right in rules.items() if not is_right] + ([] if limits is None else _order(limits, _LIMITS))


def _order(parent, pattern):
    """Unknown, misplaced, repeated and missing elements."""
    tags = "".join(f"{child.tag} " for child in parent)
    return [] if re.fullmatch(pattern, tags) else [f"the elements {tags}"]


def _attributes(element, allowed):
    return [f"{name}={text}" for name, text in element.attrib.items() if name not in allowed or not re.fullmatch(allowed[name], text)]
