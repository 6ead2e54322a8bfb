"""What the fuzzer has found, each as a test of its own."""

import json

import pytest

from crfrefine.cases.nnunet import PREDICTION_ARGUMENTS, find_cases_to_refine
from crfrefine.errors import InputError


def test_a_damaged_fold_is_named(tmp_path):
    path = tmp_path / "c.json"
    module = pytest.importorskip("crfrefine.train.cross_validation", exc_type=ImportError)
    for damaged in ({"name": "x" * 5000, "split": 10**400}, [], {"split": [{"fit": []}]}):
        path.write_text(json.dumps({"fingerprint": "d", "fold": damaged}))
        with pytest.raises(InputError, match=r"c\.json: not a fold of train-crf") as caught:
            module.read_folds([path], "d")
        assert len(str(caught.value)) < 600
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"c\.json: not a fold of train-crf"):
        module.read_folds([path], "d")


def predictions_of(folder, source, outputs="out"):
    (folder / "a.npz").touch()
    arguments = {"list_of_lists_or_source_folder": source, "output_folder_or_list_of_truncated_output_files": outputs}
    (folder / PREDICTION_ARGUMENTS).write_text(json.dumps(arguments))
    return find_cases_to_refine(folder, (), None)


@pytest.mark.parametrize("source", ["x" * 5000, "\x1b[31m", "a\nb", "a\0b", "\ud800"], ids=lambda text: ascii(text)[:10])
def test_images_of_predictions_in_a_place_that_cannot_be(source, tmp_path):
    with pytest.raises(InputError, match=r"the images were in .*, which is no folder here") as caught:
        predictions_of(tmp_path, source)
    message = str(caught.value)
    assert len(message) < 900
    assert message.replace("\n  ", "").isprintable()
