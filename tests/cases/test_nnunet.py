"""Cases in the folders of nnU-Net: where probabilities come from, and which are missing."""

import json
import shutil

import pytest
from data_sets import found_cases
from nnunet_helpers import (
    DATASET,
    write_fold,
    write_json,
    write_predictions,
    write_tree,
)

from crfrefine.cases.nnunet import TrainedNetwork
from crfrefine.errors import InputError

TRAIN = f"nnUNetv2_train {DATASET} 3d_fullres"
NAMES = "-tr nnUNetTrainer -p nnUNetPlans"


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path)


def trained_cases(tree, **options):
    return found_cases(nnunet=tree.network, **{"include_imageless": True, **options})


def case_ids(cases):
    return [case.case_id for case in cases]


def logits_of(cases):
    return [case.network for case in cases]


def missing_of(cases):
    return [case.missing for case in cases]


def have_problem(cases):
    return [bool(case.problem) for case in cases]


def of_both_folds(tree):
    """The probabilities of the four cases, which two folds held out in turn."""
    return [(tree.archive(number % 2, number),) for number in range(4)]


def test_each_case_comes_from_the_fold_that_held_it_out(tree):
    found = trained_cases(tree)
    assert case_ids(found) == ["case0", "case1", "case2", "case3"]
    assert logits_of(found) == of_both_folds(tree)
    assert found[0].images == tuple(
        tree.raw / "imagesTr" / f"case0_000{modality}.nii.gz" for modality in range(2)
    )
    assert found[0].labels == tree.raw / "labelsTr" / "case0.nii.gz"
    assert not any(case.problem or case.missing for case in found)
    assert found.advice == ()
    assert not tree.trap.exists()


def test_images_and_labels_are_where_the_environment_says(tree, tmp_path, monkeypatch):
    place = tmp_path / "elsewhere" / DATASET
    shutil.move(tree.raw.parent, tmp_path / "elsewhere")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "elsewhere"))
    case = trained_cases(tree)[1]
    assert (case.images[0], case.labels) == (
        place / "imagesTr" / "case1_0000.nii.gz",
        place / "labelsTr" / "case1.nii.gz",
    )
    # Without it, images are given, and labels are those that nnU-Net copied.
    monkeypatch.delenv("nnUNet_raw")
    shutil.move(place / "labelsTr", tree.preprocessed / "gt_segmentations")
    case = trained_cases(tree, images=place / "imagesTr")[2]
    assert case.images[0] == place / "imagesTr" / "case2_0000.nii.gz"
    assert case.labels == tree.preprocessed / "gt_segmentations" / "case2.nii.gz"
    by_pattern = trained_cases(tree, images=place / "imagesTr" / "{case}_{modality}.nii.gz")[2]
    assert (by_pattern.images, by_pattern.labels) == (case.images, case.labels)


def test_a_fold_that_is_not_done_is_named_with_the_command(tree):
    for path in tree.validation(1).glob("*.npz"):
        path.unlink()
    found = trained_cases(tree)
    missing = [(), ("no probabilities in fold_1/validation",)] * 2
    assert missing_of(found) == missing
    assert found.advice == (f"fold 1 was not validated with --npz: {TRAIN} 1 --val --npz {NAMES}",)
    shutil.rmtree(tree.validation(1).parent)
    found = trained_cases(tree)
    assert missing_of(found) == [(), ("fold 1 is not trained",)] * 2
    assert found.advice == (f"fold 1 is not trained: {TRAIN} 1 --npz {NAMES}",)
    (tree.preprocessed / "splits_final.json").unlink()
    assert trained_cases(tree)[1].missing == ("no fold that held it out has validated it",)


def test_the_fold_of_all_cases_is_not_used_beside_others_and_refused_alone(tree):
    write_fold(tree, "all", range(4))
    found = trained_cases(tree)
    assert logits_of(found) == of_both_folds(tree)
    assert any("fold_all" in note for note in map(str, found.notes))
    # Also where nothing else is known about a case.
    (tree.preprocessed / "splits_final.json").unlink()
    shutil.rmtree(tree.network / "fold_1")
    assert logits_of(trained_cases(tree)) == [
        (tree.archive(0, 0),),
        (),
        (tree.archive(0, 2),),
        (),
    ]
    shutil.rmtree(tree.network / "fold_0")
    with pytest.raises(InputError, match=f"(?s)trained on all cases.*{TRAIN} 0 --npz {NAMES}"):
        trained_cases(tree)


def test_what_a_fold_says_about_its_own_training_cases_is_not_used(tree):
    """Left from a training with other folds: by the splits, fold 0 was trained on case 1."""
    write_fold(tree, 0, [1])
    shutil.rmtree(tree.network / "fold_1")
    found = trained_cases(tree)
    assert logits_of(found) == [
        (tree.archive(0, 0),),
        (),
        (tree.archive(0, 2),),
        (),
    ]
    # By shortened splits, no fold holds the case out.
    splits = json.loads((tree.preprocessed / "splits_final.json").read_text())
    write_json(tree.preprocessed / "splits_final.json", splits[:1])
    assert trained_cases(tree)[1].missing == ("no fold that held it out has validated it",)


def test_any_other_folder_says_what_was_looked_for(tmp_path, tree):
    shutil.copytree(
        tree.network, tmp_path / "copy"
    )  # A renamed folder still has the names of its plans.
    network = TrainedNetwork(tmp_path / "copy")
    assert (network.dataset, network.trainer, network.plans) == (DATASET, "TRAINER", "nnUNetPlans")
    for folder in (write_predictions(tree), tree.network / "fold_0", tmp_path / "absent"):
        with pytest.raises(
            InputError,
            match=f"{folder}.*DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION.*plans.json.*fold_0",
        ):
            TrainedNetwork(folder)


def test_predictions_know_their_images(tree, monkeypatch):
    folder = write_predictions(tree)
    found = found_cases(nnunet=folder)
    assert [(case.case_id, case.images[1], case.network, case.problem) for case in found] == [
        (
            f"case{n}",
            tree.raw / "imagesTs" / f"case{n}_0001.nii.gz",
            (folder / f"case{n}.npz",),
            "",
        )
        for n in range(3)
    ]
    assert not tree.trap.exists()
    shutil.copytree(
        folder, tree.network / "predictions"
    )  # Inside the folder of the network they are predictions, too.
    assert found_cases(nnunet=tree.network / "predictions")[0].network == (
        tree.network / "predictions" / "case0.npz",
    )
    (
        folder / "predict_from_raw_data_args.json"
    ).unlink()  # nnUNetv2_ensemble does not write where the images were.
    with pytest.raises(
        InputError, match=r"found no folder\n  Name the folder of the images with -i"
    ):
        found_cases(nnunet=folder)
    assert len(found_cases(tree.raw / "imagesTs", nnunet=folder)) == 3
    folder = write_predictions(
        tree, list_of_lists_or_source_folder=f"nnUNet_raw/{DATASET}/imagesTs"
    )
    with pytest.raises(
        InputError,
        match=r"(?s)expected the folder of the images, found nnUNet_raw"
        r".*Name the folder of the images with -i",
    ):
        found_cases(nnunet=folder)
    monkeypatch.chdir(tree.root)  # A relative path begins where nnU-Net was started.
    assert len(found_cases(nnunet=folder)) == 3


def test_a_case_without_prediction_is_a_problem_and_one_without_image_a_note(tree):
    folder = write_predictions(tree)
    (folder / "case1.npz").unlink()
    (folder / "case2.npz").rename(folder / "stray.npz")
    (folder / "case2.nii.gz").unlink()
    found = found_cases(nnunet=folder)
    assert have_problem(found) == [False, True, True]
    assert "--save_probabilities" in found[1].problem
    assert any(
        "ignored 1 file of probabilities without images, such as stray.npz" in note
        for note in map(str, found.notes)
    )


def test_the_validated_cases_of_a_network_are_refined_and_the_others_left_out(tree):
    shutil.rmtree(tree.network / "fold_1")
    shutil.rmtree(tree.raw / "labelsTr")  # which refining does not need
    found = found_cases(nnunet=tree.network)
    assert case_ids(found) == ["case0", "case2"]
    assert (
        str(found.notes[0]) == "2 of 4 cases are left out: fold 1 is not trained (2): case1, case3"
    )
    assert str(found.notes[1]).startswith("fold 1 is not trained: nnUNetv2_train")
    for path in tree.network.rglob("*.npz"):
        path.unlink()
    with pytest.raises(
        InputError, match=f"(?s){TRAIN} 0 --val --npz {NAMES}.*{TRAIN} 1 --npz {NAMES}"
    ):
        found_cases(nnunet=tree.network)
    with pytest.raises(
        InputError, match=r"no CASE\.npz; predict with nnUNetv2_predict \.\.\. --save_probabilities"
    ):
        found_cases(nnunet=write_predictions(tree, npz=False))


def test_images_of_predictions_without_a_note_of_them_are_those_of_the_raw_data(tree):
    validation = tree.validation(0)
    found = found_cases(nnunet=validation)
    assert case_ids(found) == ["case0", "case2"]
    assert found[0].images[0] == tree.raw / "imagesTr" / "case0_0000.nii.gz"
    told = f"{validation}: the images are those of nnU-Net's raw data, {tree.raw / 'imagesTr'}"
    assert str(found.notes[0]) == told
    # A cross-validation in the network's folder, and an ensemble in that of the data set.
    ensemble = tree.network.parent / "ensembles" / "ensemble___a___b___0_1"
    for place in (tree.network / "crossval_results_folds_0_1", ensemble):
        shutil.copytree(validation, place)
        assert found_cases(nnunet=place)[0].images == found[0].images
    # Elsewhere the plans name the data set; of two folders with its cases, neither is taken.
    folder = write_predictions(tree)
    (folder / "predict_from_raw_data_args.json").unlink()
    with pytest.raises(InputError) as told:
        found_cases(nnunet=folder)
    lines = str(told.value).splitlines()
    assert lines[1].endswith("with -i; these have images of its cases:")
    assert lines[2:] == [f"    {tree.raw / name}" for name in ("imagesTr", "imagesTs")]
    shutil.rmtree(tree.raw / "imagesTr")
    images = found_cases(nnunet=folder)[0].images
    assert images[0] == tree.raw / "imagesTs" / "case0_0000.nii.gz"
    for path in (tree.raw / "imagesTs").glob("case1_*"):
        path.unlink()
    with pytest.raises(InputError, match="these lack images of its cases"):
        found_cases(nnunet=folder)


def test_the_folder_of_a_fold_or_of_a_data_set_names_its_networks(tree):
    other = tree.network.with_name("nnUNetTrainer__nnUNetPlans__2d")
    shutil.copytree(tree.network, other)
    for find in (TrainedNetwork, lambda path: found_cases(nnunet=path)):
        with pytest.raises(InputError, match="It lies in the folder of a trained network") as told:
            find(tree.network / "fold_0")
        assert f"\n    {tree.network}" in str(told.value)
        with pytest.raises(InputError, match="It has trained networks; name one of them") as told:
            find(tree.network.parent)
        assert f"\n    {other}\n    {tree.network}" in str(told.value)
