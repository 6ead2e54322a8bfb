"""Files of one case are of one patient, one study and one frame of reference, wherever two DICOM objects meet."""

import shutil

import numpy as np
import pytest
from cli_helpers import run_here
from dicom_helpers import save, slices
from io_helpers import OBLIQUE, affine_of, numbers

from crfrefine import io
from crfrefine.cases.case import read_case_headers
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.errors import InputError
from crfrefine.io.dicom_identity import DicomIdentity
from crfrefine.train.dataset import DataFolders, find_cases

SHAPE = (5, 6, 7)
AFFINE = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE @ np.diag([1.0, -1.0, 1.0]))
LABELS = (numbers(SHAPE, dtype=np.int64) % 3).astype(np.uint8)
ALLOW = "--allow-mismatched-dicom"

OTHER_PATIENT = {"PatientID": "P-0042", "StudyInstanceUID": "1.2.77", "FrameOfReferenceUID": "1.2.78"}
OTHER_STUDY = {"StudyInstanceUID": "1.2.77"}
OTHER_FRAME = {"FrameOfReferenceUID": "1.2.78"}


def series(folder, **values):
    """A series; None takes an element away, as de-identification does."""
    found = list(slices(numbers(SHAPE, dtype=np.int16), AFFINE, series=f"1.2.3.{sum(folder.name.encode())}"))
    for one in found:
        one.PatientID = "P-9999"
        for name, value in values.items():
            if value is None:
                delattr(one, name)
            else:
                setattr(one, name, value)
    return save(folder, found)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("dicom")
    found = {}
    for name, values in (("own", {}), ("patient", OTHER_PATIENT), ("study", OTHER_STUDY), ("frame", OTHER_FRAME)):
        found[name] = series(root / name, **values)
        found[f"seg of {name}"] = root / f"{name}.dcm"
        io.write_label_map(found[f"seg of {name}"], LABELS, io.read_volume(found[name]))
    return found


def run(command, made, whose, out, *more, status=None):
    """Let the series `own` meet the segmentation of another one, or the other series."""
    image, other = made["own"], made[f"seg of {whose}"]
    if command == "infer":
        return run_here("infer", "-i", image, "-p", other, "--input-type", "labels", "-o", out / "out.dcm", *more, status=status)
    if command == "mask":
        seg = made["seg of own"]
        return run_here("infer", "-i", image, "-p", seg, "-m", other, "--input-type", "labels", "-o", out / "out.dcm", *more, status=status)
    if command == "modality":
        logits = ("-p", made["seg of own"], "--input-type", "labels")
        return run_here("infer", "-i", image, "-i", made[whose], *logits, "-o", out / "out.dcm", *more, status=status)
    if command == "evaluate":
        return run_here("evaluate", other, made["seg of own"], "-o", out / "report", "--no-report", *more, status=status)
    return run_here("convert", other, out / "out.dcm", "--like", image, *more, status=status)


COMMANDS = ("infer", "mask", "modality", "evaluate", "convert")


@pytest.mark.parametrize("command", COMMANDS)
def test_another_patient_is_refused_with_the_option_too(command, made, tmp_path):
    result = run(command, made, "patient", tmp_path, ALLOW, status=1)
    assert "DICOM files of different patients\n" in result.stderr
    assert "PatientID 'P-9999', StudyInstanceUID '1.2.3', FrameOfReferenceUID '1.2.5'" in result.stderr
    assert "PatientID 'P-0042', StudyInstanceUID '1.2.77', FrameOfReferenceUID '1.2.78'" in result.stderr
    assert not list(tmp_path.glob("*.dcm"))


@pytest.mark.parametrize("command", COMMANDS)
def test_another_study_or_frame_needs_the_option(command, made, tmp_path):
    whose, what = ("study", "studies") if command in ("infer", "evaluate") else ("frame", "frames of reference")
    result = run(command, made, whose, tmp_path, status=1)
    assert f"DICOM files of different {what}\n" in result.stderr
    assert f"give {ALLOW}" in result.stderr
    allowed = run(command, made, whose, tmp_path, ALLOW, *(["-v"] if command != "convert" else []), status=0)
    assert f"are of different {what}, which {ALLOW} accepts" in allowed.stderr


def test_training_refuses_another_study_before_it_begins(made, tmp_path):
    for folder, name in (("logits", "seg of own"), ("labels", "seg of study")):
        (tmp_path / folder).mkdir()
        for case in ("a", "b"):
            shutil.copy(made[name], tmp_path / folder / f"{case}.dcm")
            shutil.copytree(made["own"], tmp_path / "images" / case, dirs_exist_ok=True)
    data = DataFolders(tmp_path / "images", tmp_path / "labels", tmp_path / "logits")
    with pytest.raises(InputError, match="case 'a': DICOM files of different studies"):
        find_cases(data, input_type="labels")
    assert len(find_cases(data, input_type="labels", allow_mismatched_dicom=True).files) == 2


def test_info_shows_patient_and_study_and_the_mismatch(made, tmp_path):
    shown = run_here("info", made["own"], made["seg of patient"], status=0)
    assert "patient       P-9999" in shown.stdout
    assert "study         1.2.77" in shown.stdout
    assert "frame of ref  1.2.5" in shown.stdout
    assert "\n\nnote: these are not files of one case: DICOM files of different patients\n" in shown.stdout
    assert "not files of one case" not in run_here("info", made["own"], made["seg of own"]).stdout
    for number, name in enumerate(("own", "patient")):
        shutil.copytree(made[name], tmp_path / f"case_{number:04d}")
    folder = run_here("info", tmp_path, status=1)
    assert "wrong: case 'case': DICOM files of different patients" in folder.stdout


def test_what_one_side_lacks_is_no_difference(made, tmp_path):
    nobody = series(tmp_path / "nobody", PatientID=None, FrameOfReferenceUID=None, StudyInstanceUID="")
    assert io.read_header(nobody).identity == DicomIdentity()
    files = CaseFiles("case", (nobody, made["own"]), (made["seg of own"],))
    assert not read_case_headers(files).notes
    # The first file knows nothing, the others contradict each other.
    with pytest.raises(InputError, match="different patients"):
        read_case_headers(CaseFiles("case", (nobody, made["own"], made["patient"])), ReadingOptions(allow_mismatched_dicom=True))


def test_two_patients_under_one_series_number(tmp_path):
    found = list(slices(numbers(SHAPE, dtype=np.int16), AFFINE))
    found[4].PatientID = "P-0042"
    with pytest.raises(InputError, match=r"case: slices that differ in PatientID: IM000\d\.dcm"):
        io.read_header(save(tmp_path / "case", found))


def test_a_finished_output_of_another_patient_is_written_anew(made, tmp_path):
    (tmp_path / "out.dcm").write_bytes(made["seg of patient"].read_bytes())
    run("infer", made, "own", tmp_path, "--continue", status=0)
    assert io.read_header(tmp_path / "out.dcm").identity.patient == "P-9999"
