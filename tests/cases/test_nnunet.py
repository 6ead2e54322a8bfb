"""Finding cases in the folders of nnU-Net: the source of each case's probabilities, and the messages about missing files."""

import json
import shutil

import nibabel as nib
import pytest
from nnunet_helpers import AFFINE, DATASET, NETWORK, describe, plans, write_fold, write_json, write_predictions, write_tree

from crfrefine.cases.nnunet.layout import require_trained
from crfrefine.cases.nnunet.trained import find_cases_to_refine, find_trained_cases
from crfrefine.errors import InputError

TRAIN = f"nnUNetv2_train {DATASET} 3d_fullres"
NAMES = "-tr nnUNetTrainer -p nnUNetPlans"
TASK = "nnUNet/3d_fullres/Task004_X"
TRAINED_BY_VERSION_1 = TASK + "/nnUNetTrainerV2__nnUNetPlansv2.1"


VALIDATED = tuple(f"validation/{name}" for name in ("summary.json", "case1.nii.gz", "case3.nii.gz"))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path)


def trained_cases(tree, **options):
    return find_trained_cases(require_trained(tree.network), **options)


def complaint(path, function=require_trained):
    with pytest.raises(InputError) as error:
        function(path)
    return str(error.value)


# ---- A trained network


def test_each_case_comes_from_the_fold_that_held_it_out(tree):
    found = trained_cases(tree)
    assert [(case.case_id, case.logits) for case in found.cases] == [
        (f"case{number}", (tree.archive(number % 2, number),)) for number in range(4)
    ]
    first = found.cases[0]
    assert first.images == tuple(tree.raw / "imagesTr" / f"case0_000{modality}.nii.gz" for modality in range(2))
    assert first.labels == tree.raw / "labelsTr" / "case0.nii.gz"
    assert not any(case.problem or case.missing for case in found.cases)
    assert found.advice == ()
    assert found.description.labels == {"background": 0, "shell": 1, "core": 2, "cyst": 3}
    assert not tree.trap.exists()


def test_images_and_labels_are_where_the_environment_says(tree, tmp_path, monkeypatch):
    shutil.move(tree.raw.parent, tmp_path / "elsewhere")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    case = trained_cases(tree).cases[1]
    assert case.images[0] == tmp_path / "elsewhere" / DATASET / "imagesTr" / "case1_0000.nii.gz"
    assert case.labels == tmp_path / "elsewhere" / DATASET / "labelsTr" / "case1.nii.gz"
    # Without it, images are given, and labels are those that nnU-Net copied.
    monkeypatch.delenv("nnUNet_raw")
    shutil.move(tmp_path / "elsewhere" / DATASET / "labelsTr", tree.preprocessed / "gt_segmentations")
    case = trained_cases(tree, images=tmp_path / "elsewhere" / DATASET / "imagesTr").cases[2]
    assert case.images[0] == tmp_path / "elsewhere" / DATASET / "imagesTr" / "case2_0000.nii.gz"
    assert case.labels == tree.preprocessed / "gt_segmentations" / "case2.nii.gz"


@pytest.mark.parametrize("what", ["imagesTr", "labelsTr"])
def test_places_that_were_looked_at_are_named(tree, what):
    shutil.rmtree(tree.raw / what)
    with pytest.raises(InputError, match=str(tree.raw / what)) as error:
        trained_cases(tree)
    assert f"--{'images' if what == 'imagesTr' else 'labels'}" in str(error.value)
    assert "nnUNet_raw" in str(error.value)


def test_a_dataset_that_lists_its_files_is_read_as_nnunet_reads_it(tree, monkeypatch, tmp_path):
    shutil.move(tree.raw / "imagesTr", tmp_path / "pictures")
    monkeypatch.setenv("PICTURES", str(tmp_path / "pictures"))
    listed = {
        f"case{number}": {"images": [f"$PICTURES/case{number}_000{k}.nii.gz" for k in range(2)], "label": f"labelsTr/case{number}.nii.gz"}
        for number in range(4)
    }
    write_json(tree.raw / "dataset.json", describe(dataset=listed))
    found = trained_cases(tree).cases
    assert [case.images[1] for case in found] == [tmp_path / "pictures" / f"case{number}_0001.nii.gz" for number in range(4)]
    assert [case.labels for case in found] == [tree.raw / "labelsTr" / f"case{number}.nii.gz" for number in range(4)]
    assert [case.logits for case in found] == [(tree.archive(number % 2, number),) for number in range(4)]


@pytest.mark.parametrize(
    ("left", "advice"),
    [
        ((), f"fold 1 is not trained: {TRAIN} 1 --npz {NAMES}"),
        (("checkpoint_latest.pth",), f"fold 1 is not trained to its end: {TRAIN} 1 --npz --c {NAMES}"),
        (("checkpoint_final.pth",), f"fold 1 is not validated to its end: {TRAIN} 1 --val --npz {NAMES}"),
        (("checkpoint_final.pth", *VALIDATED), f"fold 1 was validated without --npz: {TRAIN} 1 --val --npz {NAMES}"),
    ],
    ids=["absent", "stopped", "without validation", "without npz"],
)
def test_a_fold_that_is_not_done_is_named_with_the_command(tree, left, advice):
    shutil.rmtree(tree.validation(1).parent)
    for name in left:
        write_json(tree.network / "fold_1" / name, {})
    found = trained_cases(tree)
    assert [bool(case.missing) for case in found.cases] == [False, True, False, True]
    assert found.advice == (advice,)


def test_without_splits_all_missing_folds_are_named(tree):
    (tree.preprocessed / "splits_final.json").unlink()
    shutil.rmtree(tree.network / "fold_1")
    found = trained_cases(tree)
    assert found.cases[1].missing == ("not validated by fold 0",)
    assert [line[: len("fold 1 is not trained")] for line in found.advice] == [f"fold {fold} is not trained" for fold in (1, 2, 3, 4)]


def test_a_network_that_was_trained_on_all_cases_is_refused(tree):
    for fold in (0, 1):
        shutil.rmtree(tree.network / f"fold_{fold}")
    write_fold(tree, "all", range(4))
    with pytest.raises(InputError, match="trained on all cases") as error:
        trained_cases(tree)
    assert f"{TRAIN} 0 --npz {NAMES}" in str(error.value)


def test_beside_other_folds_the_one_of_all_cases_is_not_used(tree):
    write_fold(tree, "all", range(4))
    found = trained_cases(tree)
    assert [case.logits for case in found.cases] == [(tree.archive(number % 2, number),) for number in range(4)]
    assert any("fold_all" in note for note in found.cases.notes)
    # Also where nothing else is known about a case.
    (tree.preprocessed / "splits_final.json").unlink()
    shutil.rmtree(tree.network / "fold_1")
    assert [case.logits for case in trained_cases(tree).cases] == [(tree.archive(0, 0),), (), (tree.archive(0, 2),), ()]


def test_what_a_fold_says_about_its_own_training_cases_is_not_used(tree):
    """Left from a training with other folds: by the splits, fold 0 was trained on case 1."""
    write_fold(tree, 0, [1])
    shutil.rmtree(tree.network / "fold_1")
    found = trained_cases(tree)
    assert [case.logits for case in found.cases] == [(tree.archive(0, 0),), (), (tree.archive(0, 2),), ()]
    # Where the splits hold the case out nowhere, its fold is not the one to run again.
    splits = json.loads((tree.preprocessed / "splits_final.json").read_text())
    write_json(tree.preprocessed / "splits_final.json", splits[:1])
    found = trained_cases(tree)
    assert found.cases[1].missing == ("validated by a fold that was trained on it, by splits_final.json",)


def test_of_several_folds_that_held_a_case_out_the_one_of_the_splits_is_taken(tree):
    write_json(
        tree.preprocessed / "splits_final.json",
        [{"train": ["case9"], "val": ["case0", "case2"]}, {"train": ["case9"], "val": ["case1", "case3"]}],
    )
    write_fold(tree, 0, [1])
    write_fold(tree, 2, [1])
    found = trained_cases(tree)
    assert found.cases[1].logits == (tree.archive(1, 1),)
    assert any("several folds" in note and "case1" in note for note in found.cases.notes)


def test_probabilities_that_were_not_turned_back_are_refused(tree):
    """The one reader of nnU-Net that turns images to RAS+; these images are toward LPS."""
    write_json(tree.network / "plans.json", plans(image_reader_writer="NibabelIOWithReorient"))
    assert nib.aff2axcodes(AFFINE) == ("L", "P", "S")
    cases = trained_cases(tree).cases
    assert all("toward RAS" in case.problem and "toward LPS" in case.problem for case in cases)
    for path in (tree.raw / "imagesTr").glob("case0_*"):
        nib.save(nib.as_closest_canonical(nib.load(path)), path)
    assert [bool(case.problem) for case in trained_cases(tree).cases] == [False, True, True, True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nnUNet_preprocessed/" + DATASET + "/splits_final.json", {"0": ["case0"]}, r"splits_final\.json: expected a list"),
        (f"nnUNet_results/{DATASET}/{NETWORK}/dataset.json", describe(file_ending=".png"), r"dataset\.json: the images are \.png files"),
        (f"nnUNet_results/{DATASET}/{NETWORK}/plans.json", None, "has folds, but no plans.json"),
    ],
)
def test_what_nnunet_would_not_write_is_refused(tree, name, content, message):
    write_json(tree.root / name, content)
    if content is None:
        (tree.root / name).unlink()
    with pytest.raises(InputError, match=message):
        trained_cases(tree)


# ---- Other folders


@pytest.mark.parametrize("inside", ["fold_0/validation", "crossval_results_folds_0_1"])
def test_from_a_folder_inside_the_network_is_named(tree, inside):
    (tree.network / inside).mkdir(exist_ok=True)
    message = complaint(tree.network / inside)
    assert "lies inside a trained network" in message
    assert message.endswith(f"\n    {tree.network}")


@pytest.mark.parametrize("above", ["nnUNet_results", "nnUNet_raw/" + DATASET])
def test_from_a_folder_above_or_of_the_data_the_networks_are_named(tree, above):
    other = tree.network.with_name("nnUNetTrainer__nnUNetPlans__2d")
    shutil.copytree(tree.network, other)
    first = tree.network.parents[1] / TRAINED_BY_VERSION_1
    first.mkdir(parents=True)
    (first / "plans.pkl").write_bytes(b"")
    assert complaint(tree.root / above).endswith(f"\n    {other}\n    {tree.network}")


@pytest.mark.parametrize("place", ["", TRAINED_BY_VERSION_1 + "/fold_0", "predicted"])
def test_version_1_is_named(tmp_path, place):
    first = TRAINED_BY_VERSION_1
    for name in (f"{first}/plans.pkl", f"{first}/fold_0/model_final_checkpoint.model", "predicted/plans.pkl", "predicted/case0.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    message = complaint(tmp_path / place)
    assert "nnU-Net version 1" in message
    assert 'see "File formats", grids, in crfrefine\'s documentation' in message


def test_any_other_folder_says_what_was_looked_for(tmp_path, tree):
    assert "holds predictions of nnU-Net" in complaint(write_predictions(tree))
    shutil.copytree(tree.network, tmp_path / "copy")  # is found whatever its folder is called
    network = require_trained(tmp_path / "copy")
    assert (network.dataset, network.trainer, network.plans) == (DATASET, "TRAINER", "nnUNetPlans")
    tmp_path = tmp_path / "empty"
    tmp_path.mkdir()
    message = complaint(tmp_path)
    for words in ("plans.json", "fold_0", "predict_from_raw_data_args.json", "DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION"):
        assert words in message
    assert complaint(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such folder"


def test_a_path_below_the_results_of_the_environment_is_offered(tree, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", str(tree.network.parents[1]))
    path = tree.network.relative_to(tree.network.parents[1])
    assert complaint(path) == f"{path}: no such folder; there is {tree.network}"


# ---- Predictions, and what infer refines


def test_predictions_know_their_images(tree):
    folder = write_predictions(tree)
    found = find_cases_to_refine(folder, (), None)
    assert [(case.case_id, case.images[1], case.logits, case.problem) for case in found] == [
        (f"case{n}", tree.raw / "imagesTs" / f"case{n}_0001.nii.gz", (folder / f"case{n}.npz",), None) for n in range(3)
    ]
    assert not tree.trap.exists()
    shutil.copytree(folder, tree.network / "predictions")  # Inside the folder of the network they are predictions, too.
    assert find_cases_to_refine(tree.network / "predictions", (), None)[0].logits == (tree.network / "predictions" / "case0.npz",)
    (folder / "predict_from_raw_data_args.json").unlink()  # nnUNetv2_ensemble does not write where the images were.
    with pytest.raises(InputError, match=r"there is no such file\n  Name the folder of the images with -i"):
        find_cases_to_refine(folder, (), None)
    assert len(find_cases_to_refine(folder, (tree.raw / "imagesTs",), None)) == 3


@pytest.mark.parametrize("output", ["predictions", "out/../predictions"])
def test_relative_folders_begin_where_nnunet_was_started(tree, monkeypatch, tmp_path, output):
    """The predictions were noted as a relative path too, which tells where that was."""
    names = {"list_of_lists_or_source_folder": f"nnUNet_raw/{DATASET}/imagesTs", "output_folder_or_list_of_truncated_output_files": output}
    folder = write_predictions(tree, **names)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert find_cases_to_refine(folder, (), None)[0].images[0] == tree.raw / "imagesTs" / "case0_0000.nii.gz"
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"(?s)seen from the folder in which nnUNetv2_predict was started.*Name the folder of the images"):
        find_cases_to_refine(moved, (), None)
    monkeypatch.chdir(tree.root)
    assert len(find_cases_to_refine(moved, (), None)) == 3


def test_predictions_of_listed_files_have_the_names_that_they_were_given(tree):
    lists = [[str(tree.raw / "imagesTs" / f"case{n}_000{k}.nii.gz") for k in range(2)] for n in range(3)]
    folder = write_predictions(tree, list_of_lists_or_source_folder=lists)
    assert [case.case_id for case in find_cases_to_refine(folder, (), None)] == ["case0", "case1", "case2"]
    (folder / "case1.npz").rename(folder / "other.npz")
    outputs = [str(folder / name) for name in ("case0", "other", "case2")]
    write_predictions_arguments = {"list_of_lists_or_source_folder": lists, "output_folder_or_list_of_truncated_output_files": outputs}
    write_json(folder / "predict_from_raw_data_args.json", write_predictions_arguments)
    found = find_cases_to_refine(folder, (), None)
    assert [(case.case_id, case.images[0].name, case.logits[0].name) for case in found] == [
        ("case0", "case0_0000.nii.gz", "case0.npz"),
        ("case2", "case2_0000.nii.gz", "case2.npz"),
        ("other", "case1_0000.nii.gz", "other.npz"),
    ]
    outputs[2] = str(tree.raw / "case0")
    write_json(folder / "predict_from_raw_data_args.json", write_predictions_arguments)
    with pytest.raises(InputError, match=r"predict_from_raw_data_args\.json: two cases are called case0\n  Name the folder of the images"):
        find_cases_to_refine(folder, (), None)


def test_a_case_without_prediction_is_a_problem_and_one_without_image_a_note(tree):
    folder = write_predictions(tree)
    (folder / "case1.npz").unlink()
    (folder / "case2.npz").rename(folder / "stray.npz")
    (folder / "case2.nii.gz").unlink()
    found = find_cases_to_refine(folder, (), None)
    assert [bool(case.problem) for case in found] == [False, True, True]
    assert "--save_probabilities" in found[1].problem
    assert "not predicted" in found[2].problem
    assert any("predictions without images are ignored (1), such as stray.npz" in note for note in found.notes)


def test_the_validated_cases_of_a_network_are_refined_and_the_others_left_out(tree):
    shutil.rmtree(tree.network / "fold_1")
    shutil.rmtree(tree.raw / "labelsTr")  # which refining does not need
    found = find_cases_to_refine(tree.network, (), None)
    assert [case.case_id for case in found] == ["case0", "case2"]
    assert found.notes[0] == "2 of 4 cases are left out: fold 1 is not trained (2): case1, case3"
    assert found.notes[1].startswith("fold 1 is not trained: nnUNetv2_train")
    for path in tree.network.rglob("*.npz"):
        path.unlink()
    with pytest.raises(InputError, match=f"(?s){TRAIN} 0 --val --npz {NAMES}.*{TRAIN} 1 --npz {NAMES}"):
        find_cases_to_refine(tree.network, (), None)
    with pytest.raises(InputError, match=r"(?s)run without --save_probabilities.*nnUNetv2_predict \.\.\. --save_probabilities"):
        find_cases_to_refine(write_predictions(tree, npz=False), (), None)
