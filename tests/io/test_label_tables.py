"""Tables of label names in NIfTI headers: a hostile one costs its names, never the run, the voxels or much memory."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np

TABLE = '<CaretExtension><LabelTable><Label Key="3" Red="1" Green="0.5" Blue="0">liver</Label></LabelTable></CaretExtension>'
# A document whose letters are UTF-16, with bytes in it that name the table.
MARK = "<!--" + b"<CaretExtension>".decode("utf-16-be") + "-->"
CHAIN = "".join(f'<!ENTITY a{i} "&a{i + 1};">' for i in range(30_000)) + '<!ENTITY a30000 "x">'
NESTED = '<!ENTITY a0 "' + "ab\n" * 1000 + '">' + "".join(f'<!ENTITY a{i} "' + 10 * f"&a{i - 1};" + '">' for i in range(1, 7))
ATTRIBUTES = " ".join(f'a{i}=""' for i in range(80_000))
DOCUMENT = '<?xml version="1.0"?><!DOCTYPE r [{}]><r>{}&a{};</r>'
PADDING = " " * 1_900_000
CHILD = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from crfrefine import io
for name in sys.argv[1:]:
    volume = io.read_volume(Path(name))
    header = volume.header
    print(json.dumps([header.notes, [segment.name for segment in header.segments], int(volume.data.sum())]))
"""


def utf16(text):
    return b"\xfe\xff" + text.encode("utf-16-be")


HOSTILE = {
    "chain of entities in UTF-16": utf16(DOCUMENT.format(CHAIN, MARK, 0)),
    "nested entities in UTF-16": utf16(DOCUMENT.format(NESTED, MARK + PADDING + "&a4;&a4;", 4)),
    "chain of entities": DOCUMENT.format(CHAIN, "<CaretExtension/>", 0).encode(),
    "nested entities": DOCUMENT.format(NESTED, "<CaretExtension/>", 4).encode(),
    "document type behind a comment": f'<!-- <![CDATA[ --><!DOCTYPE r [<!ENTITY a "b">]>{TABLE}'.encode(),
    **{encoding: TABLE.encode(encoding) for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-32-le")},
    "declared UTF-16": f'<?xml version="1.0" encoding="UTF-16"?>{TABLE}'.encode("utf-16-le"),
    "UTF-7 that hides a document type": f'<?xml version="1.0" encoding="UTF-7"?>+ADwAIQ-DOCTYPE r>{TABLE}'.encode(),
    "Latin-1": TABLE.replace("liver", "Nägel").encode("latin-1"),
    "a million nested elements": b"<CaretExtension>" + b"<a>" * 300_000,
    "too long": b"<CaretExtension>" + b"<Label/>" * 200_000,
    "many attributes": f"<CaretExtension><Label {ATTRIBUTES}/>".encode(),
    "a key that is no number": TABLE.replace('"3"', '"\x1b[2J"').encode(),
    "cut off": TABLE[:-30].encode(),
}
GOOD = {
    "declared otherwise": f'<?xml version="1.0" encoding="UTF-16"?>{TABLE}'.encode(),
    "with a mark of UTF-8": TABLE.encode("utf-8-sig"),
    "with a comment": f"<!-- names -->{TABLE}".encode(),
}


def write(path, table):
    labels = np.zeros((5, 7, 6), np.uint8)
    labels[1:4, 2:5, 1:5] = 3
    image = nib.Nifti1Image(labels, np.diag([1.0, 1.5, 2.25, 1.0]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, table))
    nib.save(image, path)
    return path


def test_no_table_costs_more_than_its_names(tmp_path):
    paths = [write(tmp_path / f"{number}.nii.gz", table) for number, table in enumerate((*HOSTILE.values(), *GOOD.values()))]
    assert paths[1].stat().st_size < 20_000
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip((*HOSTILE, *GOOD), map(json.loads, done.stdout.splitlines()), strict=True))
    for name, (notes, names, total) in found.items():
        assert total == 3 * 3 * 4 * 3, name
        assert names == (["liver"] if name in GOOD else []), name
        assert len(notes) == (name in HOSTILE), name
        assert all(note.startswith("the table of label names in its header cannot be read: ") for note in notes)
        assert all(len(note) < 200 and note.isprintable() for note in notes)
