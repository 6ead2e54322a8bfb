"""The description for 3D Slicer and MITK is valid, and the executable takes what a viewer makes of it."""

import contextlib
import re
import subprocess
import sys
from email.message import Message
from xml.etree import ElementTree

import numpy as np
from cli_helpers import FAST, load_nifti, run_here, write_folders
from slicer_schema import problems

from crfrefine.apps.tools.descriptors.command import Command, Option
from crfrefine.apps.tools.descriptors.slicer import LEFT_OUT, infer_arguments, slicer_xml
from crfrefine.cli import entries
from crfrefine.cli.describe import command_of
from crfrefine.parameters.presets import list_presets


def described():
    done = run_here("describe", "slicer", status=0)
    return done.stdout


def slicer(*arguments):
    code = "from crfrefine.cli.entries import slicer; slicer()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def command_line(values):
    """What a viewer makes of a panel: every option with its value, texts that are empty, switches only where they are on."""
    words = []
    for parameter in ElementTree.fromstring(described().encode()).iterfind("parameters/*[longflag]"):
        name, flag = parameter.findtext("name"), parameter.findtext("longflag")
        value = values.get(name, parameter.findtext("default", ""))
        if parameter.tag == "boolean":
            words += [flag] if value == "true" else []
        elif parameter.tag in ("image", "file") and not value:
            continue
        else:
            words += [flag, value]
    return words


def test_the_panel_has_every_option_and_speaks_to_people_who_click():
    """Presets are a list with a word about each; no text names an option of the command."""
    assert problems(described()) == []
    root = ElementTree.fromstring(described().encode())
    names = {option.name for option in command_of("infer").options}
    shown = {found.text for found in root.iterfind("parameters/*/name")}
    assert shown == names - LEFT_OUT | {"config_file"}
    assert {"images", "logits", "output", "config", "overrides", "threads"} <= shown
    presets = next(found for found in root.iterfind("parameters/string-enumeration") if found.findtext("name") == "config")
    assert [choice.text for choice in presets.findall("element")] == list_presets()
    assert presets.findtext("default") == "default"
    assert "body-ct: Organs and bones in CT in Hounsfield units, as many labels as there are." in presets.findtext("description")
    texts = [
        root.findtext("description"),
        *(found.text for tag in ("description", "label") for found in root.iterfind(f"parameters/*/{tag}")),
    ]
    assert not [text for text in texts if re.search(r"(?<!\w)--?[a-z]|repeat|Default:", text)]
    other = run_here("describe", "slicer", "evaluate")
    assert (other.status, "expected infer" in other.stderr) == (2, True)


def test_the_panel_links_the_documentation_that_the_package_states(monkeypatch):
    stated = Message()
    stated["Project-URL"] = "Source, https://example.org/source"
    stated["Project-URL"] = "Documentation, https://example.org/docs"
    monkeypatch.setattr("crfrefine.apps.tools.descriptors.slicer.metadata", lambda name: stated)
    text = described()
    assert problems(text) == []
    assert ElementTree.fromstring(text.encode()).findtext("documentation-url") == "https://example.org/docs"


def test_numbers_keep_their_limits_and_choices_their_values():
    options = (
        Option("tolerance", "--tolerance", "number", "In mm.", default="1.0", minimum=0.0),
        Option("parts", "--num-parts", "integer", "Parts.", default="1", minimum=1, maximum=9),
        Option("kind", "--kind", "text", "A kind.", choices=("a", "b"), default="b"),
    )
    text = slicer_xml(Command("infer", "Refine.", options))
    assert problems(text) == []
    root = ElementTree.fromstring(text.encode())
    assert [limit.text for limit in root.find("parameters/integer/constraints")] == ["1", "9", "1"]
    assert root.findtext("parameters/integer/longflag") == "--num_parts"
    assert root.findtext("parameters/string-enumeration/default") == "b"


def test_the_executable_answers_and_refines_as_infer_does(tmp_path, monkeypatch):
    answer = slicer("--xml")
    assert (answer.returncode, answer.stdout) == (0, described())
    folders = write_folders(tmp_path, "a")
    image, logits = folders.images / "a_0000.nii.gz", folders.logits / "a.nii.gz"
    values = {"images": str(image), "logits": str(logits), "output": str(tmp_path / "panel.nii.gz"), "threads": "1", "resample": "true"}
    monkeypatch.setattr(sys, "argv", ["crfrefine-slicer", *command_line(values | {"overrides": FAST[1]})])
    with contextlib.suppress(SystemExit):
        entries.slicer()
    run_here("infer", "-i", image, "-p", logits, "-o", tmp_path / "infer.nii.gz", *FAST, "--resample", status=0)
    np.testing.assert_array_equal(load_nifti(tmp_path / "panel.nii.gz"), load_nifti(tmp_path / "infer.nii.gz"))


def test_a_viewers_words_become_those_of_infer():
    assert infer_arguments(["--max_memory", "", "--input_type", "labels", "--resample", "--output", "a_b.nrrd", "--set", ""]) == [
        *("--input-type", "labels", "--resample", "--output", "a_b.nrrd")
    ]
    assert infer_arguments(["--config", "default", "--config_file", "my file.toml"]) == ["--config", "default", "--config", "my file.toml"]
    assert infer_arguments(["--config", "brats", "--config_file", ""]) == ["--config", "brats"]
    assert infer_arguments(["--max_memory=8G", "--images", "my_image.nii"]) == ["--max-memory=8G", "--images", "my_image.nii"]
