"""Manifests: every problem of a table is told, with its line, before any case is read."""

import csv

import numpy as np
import pytest
from cli_helpers import save_nifti

from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.manifest import read_manifest
from crfrefine.errors import InputError

HEAD = ["case", "images", "logits", "mask", "output", "spacing"]


@pytest.fixture
def archive(tmp_path):
    for name in ("p1/scan.nii.gz", "p1/other scan.nii.gz", "p2/x.nii.gz", "masks/1.nii.gz"):
        save_nifti(tmp_path / "archive" / name, np.ones((6, 5, 4), np.int16))
    for name in ("p1/net.nii.gz", "net_of_p2.nii.gz"):
        save_nifti(tmp_path / "archive" / name, np.zeros((6, 5, 4, 3), np.float32))
    return tmp_path / "archive"


def write(path, *rows, head=HEAD):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *(row + [""] * (len(head) - len(row)) for row in rows)])
    return path


ONE = [
    "one",
    "p1/scan.nii.gz;p1/other scan.nii.gz",
    "p1/net.nii.gz",
    "masks/1.nii.gz",
    "deep/er.nii.gz",
    "1;1.25;2.5",
]
TWO = ["two", "p2/x.nii.gz", "net_of_p2.nii.gz"]


def test_what_spreadsheets_write_is_read(archive):
    """A byte order mark, other line ends, blanks, empty lines, columns in another order."""
    (archive / "cases.csv").write_bytes(
        b"\xef\xbb\xbflogits , case,images\r\n\r\n"
        b"p1/net.nii.gz,one, p1/scan.nii.gz ; p1/other scan.nii.gz\r\n,,\r\n"
        b'"net_of_p2.nii.gz",two,p2/x.nii.gz'
    )
    assert [len(files.images) for files in read_manifest(archive / "cases.csv")] == [2, 1]


EXCEL = """Case;Images;LOGITS;spacing\r
größe;"p1\\scan.nii.gz;p1\\other scan.nii.gz";p1\\net.nii.gz;"1;1,25;2,5"\r
two;p2/x.nii.gz;net_of_p2.nii.gz;\r
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("separator", [";", "\t", "sep=;", "sep="])
def test_tables_as_excel_saves_them_in_other_countries(archive, encoding, separator):
    """Semicolons, tabs, decimal commas, upper-case headings, backslashes, and its encodings."""
    text = EXCEL
    if separator == "\t":
        rows = csv.reader(text.splitlines(), delimiter=";")
        text = "".join("\t".join(row) + "\n" for row in rows)
    elif separator.startswith("sep="):
        text = f"{separator}\r\n{text}"
    (archive / "cases.csv").write_bytes(text.encode(encoding))
    cases = read_manifest(archive / "cases.csv")
    assert [files.case_id for files in cases] == ["größe", "two"]
    assert cases[0].images == (archive / "p1/scan.nii.gz", archive / "p1/other scan.nii.gz")
    assert cases[0].spacing == (1, 1.25, 2.5)
    assert [note[:38] for note in map(str, cases.notes)] == [
        "cases.csv: is not UTF-8; read as Windo"
    ] * (encoding == "cp1252")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "case,images,logit\n",
            "expected a line of names: case, images, logits, "
            "and optionally mask, output, spacing, each once",
        ),
        (
            "case,case,images,logits\n",
            "each once, separated by commas, semicolons or tabs; found 'case', 'case', ",
        ),
        ("case|images|logits\na|b|c\n", "or tabs; found 'case|images|logits'"),
        (
            'case;images;logits\na;b;"c;d";e\n',
            "line 2: expected 3 cells, as in the line of names; in a table with semicolons, a cell",
        ),
        ("", "found an empty file"),
        ("\n \ncase,images,logits\n\na,b\n", "line 5: expected 3 cells, as in the line of names"),
        ("case,images,logits\n", "has no cases"),
        ("case,images,logits\na,b\n", "line 2: expected 3 cells, as in the line of names"),
        ('case,images,logits\n"a,b,c\n', "cannot be read as CSV after line 1: "),
        (
            "case,images,logits\n\x81,b,c\n",
            "neither UTF-8, UTF-16 with its mark nor Windows-1252 (Latin-1): 'utf-8' codec can't",
        ),
    ],
)
def test_the_table_is_checked(archive, content, problem):
    (archive / "cases.csv").write_text(content, encoding="latin-1")
    with pytest.raises(InputError) as raised:
        read_manifest(archive / "cases.csv")
    assert problem in str(raised.value)
    assert str(raised.value).startswith(f"{archive}/cases.csv: ")


BAD_SPACINGS = ("1;1;-2", "1;nan;2", "1;3e-9;2", "2.5")


def changed(**cells):
    return [cells.get(name, cell) for name, cell in zip(HEAD, ONE, strict=True)]


WRONG = [
    (changed(case=""), "line 2: no case"),
    *(
        (changed(case=name), f"of at most 200 characters; got {name!r}")
        for name in ("a/b", "a\tb", "..")
    ),
    (changed(case="a;b"), "case: expected one name, which can be that of a file: printable, "),
    (changed(case="x" * 201), "case: expected one name, "),
    (
        changed(images="p1/scan.nii.gz;"),
        "images: expected names separated by ';', none of them empty; got 'p1/scan.nii.gz;'",
    ),
    (
        changed(images="p1/nothing.nii.gz;p2/nowhere.nii.gz"),
        "images: {archive}/p1/nothing.nii.gz: no such file",
    ),
    (changed(logits="masks"), "logits: {archive}/masks: expected a file, this is a folder"),
    (changed(mask="no.nii.gz"), "mask: {archive}/no.nii.gz: no such file"),
    (changed(output="../x.nii.gz"), "unless it is absolute; got '../x.nii.gz'"),
    (changed(output="x"), "output: expected one file that can be written: its name ends in one of"),
    (changed(output=".nii.gz"), "output: expected one file that can be written: its name ends in"),
    *((changed(**{name: "x" * 300 + ".nii.gz"}), "File name too long") for name in HEAD[1:4]),
    *(
        (
            changed(spacing=text),
            f"spacing: expected mm along each axis, such as 1;1;2.5; got {text!r}",
        )
        for text in BAD_SPACINGS
    ),
    (changed(case="two"), "line 3: case 'two' is also on line 2"),
]
"""A row, and a part of the message about it."""


def test_every_cell_is_checked(archive):
    for row, problem in WRONG:
        path = write(archive / "cases.csv", [cell.format(archive=archive) for cell in row], TWO)
        for input_type in ("logits", "labels")[
            : 1 if row[2] == "masks" else 2
        ]:  # With label maps, a folder of structures may be meant.
            with pytest.raises(InputError) as raised:
                read_manifest(path, input_type=input_type)
            assert problem.format(archive=archive) in str(raised.value)
            assert len(str(raised.value)) < 1500
    (found,) = read_manifest(write(archive / "cases.csv", [*TWO, "", "", "1;2"]))
    with pytest.raises(InputError, match="has 3 axes; the spacing given for case 'two' has 2"):
        read_case_headers(found)


def test_structures_are_files_or_a_folder(archive):
    for name in ("liver", "spleen"):
        save_nifti(archive / "s" / f"{name}.nii.gz", np.zeros((6, 5, 4), np.uint8))
    for logits in ("s", "s/spleen.nii.gz;s/liver.nii.gz"):
        (found,) = read_manifest(
            write(archive / "cases.csv", ["one", "p2/x.nii.gz", logits]), input_type="labels"
        )
        assert found.structures
        assert [path.name for path in found.network] == ["liver.nii.gz", "spleen.nii.gz"]
