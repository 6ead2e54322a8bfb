"""Every Python and shell block of the README and of the pages in docs runs as it is printed, on
made-up files of the names that it uses.

A page's blocks run one after the other in one folder, so later ones find what earlier ones wrote.
What cannot run here is in `ELSEWHERE`.
"""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from cli_helpers import run_here, save_nifti
from dicom_helpers import save as save_dicom
from dicom_helpers import slices
from nnunet_helpers import AFFINE, write_json, write_predictions, write_tree
from oracles import softmax
from training_helpers import phantom

import crfrefine
from crfrefine.demo.phantom import write_phantom

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    if _BLOCK.search(page.read_text(encoding="utf-8"))
]

ELSEWHERE = {
    r"pip (install|download)|make |docker |export ": "installs, builds, or sets a variable",
    r"(\.venv/bin/)?python (examples|benchmarks)/|cd benchmarks|bash benchmarks/": (
        "the tests of examples and benchmarks run these"
    ),
    r"\.venv/bin/python -c": "prepares benchmarks on the real cases",
    r"nnUNetv2_|for fold in|TotalSegmentator": "other people's programs",
    r"crfrefine train-crf study --unlabeled ": (
        "needs structures of thirty voxels; the tests of the command make them"
    ),
    r"crfrefine tune ": "waits for a person; the tests of the page drive it",
    r".*--dask |.*--device cuda|dask (scheduler|worker) ": (
        "needs a cluster or a GPU; the tests of both have them made"
    ),
    r"crfrefine .* '[^']*\{case\}": (
        "needs data sets as they are downloaded; the tests of patterns make them"
    ),
    r"crfrefine infer .*--network-spacing ": (
        "needs blocks in maps of more and smaller voxels; the tests of the command make them"
    ),
}
"""The beginning of a statement of a shell, and why it does not run here."""

SHORT = {"train-crf": ("--num-iterations", "1", "--folds", "2")}
"""What is added to a command so that it takes no time."""


def statements(block):
    """The statements of a shell block: lines that belong together, without comments."""
    statement = ""
    for line in block.replace("\\\n", " ").splitlines():
        statement = f"{statement}\n{line}" if statement else line.strip()
        try:
            words = shlex.split(statement, comments=True)
        except ValueError:  # A quotation goes on in the next line.
            continue
        if words and words[0] == "for" and words[-1] != "done":
            continue
        if words:
            yield statement
        statement = ""


def is_elsewhere(statement):
    return any(re.match(pattern, statement, re.DOTALL) for pattern in ELSEWHERE)


def run_shell(block, folder):
    """Run a block by the shell, with the command on its path."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, content in (
        ("crfrefine", f'exec "{sys.executable}" -m crfrefine'),
        ("my_report", "test -s"),
    ):
        (tools / name).write_text(f'#!/bin/sh\n{content} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    command = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


def run_statement(statement, folder):
    words = [os.path.expandvars(word) for word in shlex.split(statement, comments=True)]
    if words[0] != "crfrefine" or {"|", "&&", ">"} & set(words):
        run_shell(statement, folder)
        return
    result = run_here(*words[1:], *SHORT.get(words[1], ()))
    # `status` leaves with 1 where something is missing: here, the parts of a run that other jobs
    # would do.
    assert result.status <= (words[1] == "status"), f"{statement}\n{result.stdout}{result.stderr}"


# ---- The files and arrays that the pages name

CASES = ("case0", "case1", "case2")
STRUCTURES = ("shell", "core", "cyst", "rest")


@functools.cache
def five_labels(seed):
    """A phantom whose first label is two: the fifth is its further part along x."""
    case = phantom(seed)
    logits = np.concatenate([case.logits, case.logits[1:2] - 3])
    labels = case.labels.copy()
    logits[1, 5:] -= 3
    logits[4, 5:] += 3
    labels[5:][labels[5:] == 1] = 4
    return replace(case, labels=labels, logits=logits)


def save(root, names, values, affine=AFFINE):
    """Write channels, an image, labels or a mask into folders; their names, and last that of the
    file, are parted by blanks.
    """
    values = np.moveaxis(values, 0, -1) if values.ndim == 4 else values
    *folders, name = names.split()
    for folder in folders:
        kind = "f4" if values.ndim == 4 else "i2" if values.dtype.kind == "f" else "u1"
        save_nifti(root / folder / f"{name}.nii.gz", values.astype(kind), affine)


def save_structures(root, folders, labels):
    for label, name in enumerate(STRUCTURES, 1):
        save(root, f"{folders} {name}", labels == label)


def write_world(root):
    """Folders of cases, and the files of one."""
    coarse = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] += AFFINE[:3, :3] @ [0.5, 0.5, 0.5]
    for seed, case_id in enumerate(CASES):
        case = five_labels(seed)
        network = case.logits.argmax(axis=0)
        for modality, values in enumerate(case.image):
            save(
                root,
                f"images imagesTs imagesTr study/images heart/images {case_id}_{modality:04d}",
                values,
            )
        save(root, f"logits logitsTs study/logits heart/logits {case_id}", case.logits)
        save(root, f"region_logits {case_id}", case.logits[1:4])
        save(root, f"labels labelsTs study/labels {case_id}", case.labels)
        save(root, f"others predictions {case_id}", network)
        save(root, f"logits_at_1.25mm {case_id}", case.logits[:, ::2, ::2, ::2], coarse)
        save(root, f"label_maps_at_1.25mm {case_id}", network[::2, ::2, ::2], coarse)
        save_structures(root, f"reference/{case_id}", case.labels)
        save_structures(root, f"outputs/{case_id} dataset/{case_id}/segmentations", network)
        save(root, f"dataset/{case_id} ct", case.image[0])
    case = five_labels(3)
    network = case.logits.argmax(axis=0)
    probabilities = softmax(case.logits)
    drawn = np.zeros(network.shape, np.uint8)
    drawn[2:5, 3, 2] = 1
    files = {"t1c": case.image[1], **dict.fromkeys(("flair", "ct", "CASE_0000"), case.image[0])}
    files |= {
        "segmentation": network,
        **dict.fromkeys(("refined", "label"), case.labels),
        "strokes": drawn,
    }
    for name, values in {**files, "logits": case.logits, "probabilities": probabilities}.items():
        save(root, f". {name}", values)
    save(root, ". pet", case.image[1][::2, ::2, ::2], coarse)
    save(root, f"corrections/strokes {CASES[0]}", drawn)
    save_structures(root, "segmentations", network)
    save_structures(root, "reference_segmentations", case.labels)
    np.savez(root / "CASE.npz", probabilities=probabilities.transpose(0, 3, 2, 1))
    np.savez(
        root / "fast.npz", probabilities=probabilities[:, ::-2, ::-2, ::2].transpose(0, 3, 2, 1)
    )  # AFFINE leads toward LPS
    for name, values in {
        "t2.mhd": case.image[0],
        "background.mha": case.logits[0],
        "prostate.mha": case.logits[1],
    }.items():
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T)), root / name
        )
    vectors = SimpleITK.GetImageFromArray(
        np.ascontiguousarray(case.logits.transpose(3, 2, 1, 0)), isVector=True
    )
    SimpleITK.WriteImage(vectors, root / "logits.mha")
    for name in ("params.toml", "trained.toml", "mine.toml", "heart/params.toml"):
        crfrefine.CrfParameters.load("default").save(root / name)


def write_to_convert(root):
    """A label map in a box of its grid, one that lost its header, and a 4-D file of times."""
    case = five_labels(3)
    labels = case.labels.astype(np.uint8)
    box = AFFINE.copy()
    box[:3, 3] += AFFINE[:3, :3] @ [1, 2, 1]
    save_nifti(root / "box.nii.gz", labels[1:6, 2:7, 1:4], box)
    run_here("convert", root / "box.nii.gz", root / "box.seg.nrrd", status=0)
    save_nifti(root / "lost.nii.gz", labels, np.eye(4))
    save_nifti(root / "cine.nii.gz", np.stack([case.image[0]] * 3, axis=-1), AFFINE)


def write_foreground(root):
    """The image of a case, and outputs of networks that leave the background out."""
    case = five_labels(3)
    probabilities = softmax(case.logits).astype(np.float32)
    log_odds = (case.logits[1] - case.logits[0]).astype(np.float32)
    for name in ("ct", "t1"):
        save(root, f". {name}", case.image[0])
    # Percent of tissues that leave more than a tenth of each voxel to the background.
    save_nifti(root / "atlas.nii.gz", np.rint(90 * np.moveaxis(probabilities[1:], 0, -1)), AFFINE)
    save(root, ". logits", case.logits[:3])
    for name, values in {
        "probability": probabilities[1],
        "before_sigmoid": log_odds,
        "liver": probabilities[1],
        "spleen": probabilities[2],
    }.items():
        save_nifti(root / f"{name}.nii.gz", values, AFFINE)


def write_refined(root):
    for seed, case_id in enumerate(CASES):
        save(root, f"refined {case_id}", five_labels(seed).labels)
    write_json(
        root / "refined" / "dataset.json",
        {"labels": {"background": 0, **{name: n for n, name in enumerate(STRUCTURES, 1)}}},
    )


def write_nnunet(root):
    tree = write_tree(root, count=4)
    write_predictions(tree)
    for folder in (tree.raw, tree.preprocessed, tree.network.parent):
        for name in ("Dataset004_Hippocampus", "Dataset004_NAME"):
            shutil.copytree(folder, folder.parent / name)


def write_manifest(root):
    lines = (
        f"{case},../images/{case}_0000.nii.gz;../images/{case}_0001.nii.gz,../logits/{case}.nii.gz"
        for case in CASES
    )
    (root / "archive").mkdir()
    (root / "archive" / "cases.csv").write_text(
        "\n".join(["case,images,logits", *lines]), encoding="utf-8"
    )


def write_radiology(root):
    pytest.importorskip("highdicom", reason="needs the extra dicom")
    case = five_labels(0)
    save_dicom(root / "CT_series", slices((1000 * case.image[0]).astype(np.int16), AFFINE))
    save(root, ". logits", case.logits)
    save(root, ". segmentation", case.logits.argmax(axis=0))
    run_here("convert", "segmentation.nii.gz", "segmentation.dcm", "--like", "CT_series", status=0)


def write_summaries(root):
    write_world(root)
    run_here(
        "infer",
        "-i",
        "images",
        "-p",
        "logits",
        "-o",
        "refined",
        "--summary",
        "summary.json",
        status=0,
    )


def write_new_cases(root):
    write_phantom(phantom(0), root)
    for name in ("images", "logits"):
        (root / name).rename(root / f"{name}Ts")


FILES = {
    **dict.fromkeys(
        ("README.md", "docs/guide/nnunet.md", "docs/guide/learning.md"), (write_world, write_nnunet)
    ),
    "docs/guide/logits.md": (write_foreground,),
    "docs/guide/monai.md": (),
    "docs/for/nnunet.md": (write_nnunet,),
    "docs/guide/refining.md": (write_world, write_manifest, write_to_convert),
    "docs/guide/evaluating.md": (write_world, write_refined),
    "docs/for/radiology.md": (write_radiology,),
    "docs/reference/summary.md": (write_summaries,),
    "docs/tutorial.md": (write_new_cases,),
}
"""What writes the files of a page; of all others `write_world`."""


def case_arrays(channels=5, modalities=2):
    """Arrays as in docs/guide/python.md, and files of them."""
    random = np.random.default_rng(0)
    shape = (9, 11, 6)
    mask = np.zeros(shape, bool)
    mask[2:5, 3:9, 1:4] = True
    arrays = {
        name: random.normal(size=(count, *shape)).astype(np.float32)
        for name, count in (("logits", channels), ("log_odds", 3))
    }
    arrays["image"] = random.uniform(size=(modalities, *shape)).astype(np.float32)
    save_nifti(Path("scan.nii.gz"), arrays["image"][0], AFFINE)
    save(Path(), ". scores", arrays["logits"])
    for name, values in arrays.items():
        np.save(name, values)
    return {**arrays, "mask": mask}


def filter_arrays():
    arrays = case_arrays()
    features = np.concatenate([np.indices(arrays["image"].shape[1:]), arrays["image"]])
    return {
        "values": arrays["logits"],
        "features": features,
        "ct": arrays["image"][0],
        "spacing": (1.0, 1.25, 2.0),
    }


def drawn_arrays():
    drawn = np.zeros((9, 11, 6), np.uint8)
    drawn[2:5, 3, 2] = 1
    return {**case_arrays(), "drawn": drawn, "crfrefine": crfrefine, "spacing": (1.0, 1.25, 2.0)}


def tensors(channels, modalities):
    """A small network with its batch, as in docs/guide/layer.md."""
    torch = pytest.importorskip("torch", reason="the layer needs PyTorch")
    torch.manual_seed(0)
    shape = (9, 11, 6)
    image = torch.rand(2, modalities, *shape)
    network = torch.nn.Conv3d(modalities, channels, 3, padding=1)
    labels, scribbles = (torch.randint(count, (2, *shape)) for count in (channels, channels + 1))
    case_arrays(channels, modalities)
    batch = {
        "network": network,
        "image": image,
        "labels": labels,
        "scribbles": scribbles,
        "cases": [(image, (1.0, 1.25, 2.0), None)],
    }
    return {
        **batch,
        "numpy": np,
        "torch": torch,
        "step": 2,
        "warm_up": 1,
        "weight": 0.1,
        "index": 0,
    }


def measured_cases():
    """Label maps of two methods, as in docs/reference/metrics.md."""
    pairs = {f"case{seed}": five_labels(seed) for seed in range(4)}
    labels = {name: case.labels for name, case in pairs.items()}
    predictions = {}
    for name, case in pairs.items():
        network = case.logits.argmax(axis=0).astype(np.uint8)
        predictions[name] = {"network": network, "crf": case.labels, "largest component": network}
    return {"cases": list(pairs), "labels": labels, "predictions": predictions}


def monai_pipeline():
    """A loader of one case and a network, as in docs/guide/monai.md and docs/guide/logits.md."""
    torch = pytest.importorskip("torch", reason="the transforms need PyTorch")
    data = pytest.importorskip("monai.data", reason="needs MONAI")
    transforms = pytest.importorskip("monai.transforms", reason="needs MONAI")
    case = five_labels(0)
    save(Path(), "images CASE_0000", case.image[0])
    save(Path(), "logits CASE", case.logits)
    load = [
        transforms.LoadImaged("image"),
        transforms.EnsureChannelFirstd("image"),
        transforms.ScaleIntensityd("image"),
    ]
    preprocessing = transforms.Compose([*load, transforms.Spacingd("image", (4.0, 4.0, 6.0))])
    dataset = data.Dataset([{"image": "images/CASE_0000.nii.gz"}], preprocessing)
    names = {
        name: getattr(transforms, name)
        for name in ("Compose", "Invertd", "AsDiscreted", "SaveImaged")
    }
    names |= {"Path": Path, "preprocessing": preprocessing, "decollate_batch": data.decollate_batch}
    return {
        **names,
        "loader": data.DataLoader(dataset, batch_size=1),
        "network": torch.nn.Conv3d(1, 5, 1).requires_grad_(False),
    }


def pydensecrf_arrays():
    arrays = case_arrays()
    return {**arrays, "image": arrays["image"][0], "probabilities": softmax(arrays["logits"])}


NAMES = {
    **dict.fromkeys(("README.md", "docs/guide/python.md"), case_arrays),
    **dict.fromkeys(("docs/guide/logits.md", "docs/guide/monai.md"), monai_pipeline),
    "docs/guide/filter.md": filter_arrays,
    "docs/guide/strokes.md": drawn_arrays,
    "docs/guide/layer.md": lambda: tensors(5, 4),
    "docs/guide/scribbles.md": lambda: tensors(4, 1),
    "docs/for/pydensecrf.md": pydensecrf_arrays,
    "docs/reference/metrics.md": measured_cases,
}
"""What the Python blocks of a page take as given."""


def parameter(page):
    """The README's blocks are quick; those of all pages take a minute."""
    return pytest.param(
        page,
        marks=() if page.parent == ROOT else pytest.mark.long,
        id=page.relative_to(ROOT).as_posix(),
    )


@pytest.mark.parametrize("page", list(map(parameter, PAGES)))
@pytest.mark.usefixtures("one_torch_thread")
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """Without what takes much of the time and is no part of any page: intervals, and processes for
    cases.
    """
    monkeypatch.setattr(
        "crfrefine.statistics.paired.bootstrap_interval", lambda *_, **__: (0.0, 0.0)
    )
    monkeypatch.setattr("crfrefine.evaluate.run.available_threads", lambda: 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    name = page.relative_to(ROOT).as_posix()
    text = page.read_text(encoding="utf-8")
    blocks = [
        (text[: block.start()].count("\n") + 2, *block.groups()) for block in _BLOCK.finditer(text)
    ]
    needs_files = any(
        language == "sh" and not all(map(is_elsewhere, statements(code)))
        for _, language, code in blocks
    )
    for write in FILES.get(name, (write_world,) if needs_files else ()):
        write(tmp_path)
    names = (
        NAMES.get(name, dict)() if any(language == "python" for _, language, _ in blocks) else {}
    )
    for line, language, code in blocks:
        if language == "python":
            # `test_nnunet_real` runs what needs nnU-Net.
            if "nnunetv2" not in code and (
                "pydensecrf" not in code or importlib.util.find_spec("pydensecrf") is not None
            ):
                # Lines of the page, so that a traceback shows where it failed.
                exec(compile("\n" * (line - 1) + code, page, "exec"), names)
        elif code.startswith("#!"):
            run_shell(code, tmp_path)
        else:
            for statement in statements(code):
                if not is_elsewhere(statement):
                    run_statement(statement, tmp_path)
