"""Record what some two hundred runs on real cases write, to see that no bit of it changes.

    python -P benchmarks/same_bits.py record before.json
    python -P benchmarks/same_bits.py compare before.json

`record` runs commands and functions of the installed package on the cases of CRFREFINE_DATA, and
notes a hash of each voxel array, table, message and exit status. `compare` runs them again, and
lists what is different: nothing, on the same machine with the same libraries. Times, places of
files and versions do not count. With words after the file, only runs whose name has one of them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from scripts import DATA, case_names, spread

HIPPOCAMPUS = DATA / "hippocampus"
BRATS = DATA / "brats2015"
ATRIUM = DATA / "atrium"
ITK = DATA / "hippocampus_mhd"

# Sets of parameters, as --set has them: each entry of a parameter file occurs.
SETS = [
    "mean_field.filter=exact",
    "mean_field.filter=truncated",
    "mean_field.filter=lattice",
    "mean_field.filter=grid",
    "mean_field.filter=lattice bilateral.theta_alpha=6 bilateral.theta_beta=0.2",
    "bilateral.theta_alpha=[3,1,2] bilateral.weight=[1,5,2]",
    "bilateral.theta_alpha=12 bilateral.theta_beta=0.3 mean_field.normalization=after",
    "spatial.weight=3 spatial.theta_gamma=2.5",
    "bilateral.weight=0 spatial.weight=2 spatial.theta_gamma=[1,2,0.7]",
    "compatibility.kind=matrix compatibility.matrix=[[0,1,2],[1,0,0.5],[2,0.5,0]]",
    "mean_field.num_iterations=1",
    "mean_field.num_iterations=12 mean_field.tolerance=0",
    "mean_field.tolerance=0.01",
    "mean_field.temperature=2.5",
    "mean_field.temperature=0.2",
    "mean_field.bias=[0,-1,0.5]",
    "mean_field.output_temperature=3",
    "mean_field.positions=voxels",
    "mean_field.label_threshold=0",
    "volume.weight=0.5",
    "volume.weight=0.7",
    "intensity.normalization=zscore bilateral.theta_beta=0.5",
    "intensity.normalization=none bilateral.theta_beta=50",
    "intensity.normalization=window intensity.window=[100,900]",
    "intensity.percentiles=[5,90]",
    "intensity.mask=nonzero",
    "postprocess.keep_largest=each postprocess.fill_holes=each",
    "postprocess.keep_largest=foreground postprocess.min_component_ml=0.05 "
    "postprocess.fill_holes=foreground",
]
PRESETS = [
    "default",
    "hippocampus",
    "brats",
    "crfrnn",
    "keep-volumes",
    "krahenbuhl",
    "body-ct",
    "monai",
    "body-mr",
]
OPTIONS = ["", "--preview", "--save-structures", "--threads 1", "-v", "-m nonzero"]
OPTIONS.append("--part-id 0 --num-parts 2")
FORMATS = [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".seg.nrrd", ".mgz", ".npz"]


def case_files(folder: Path, number: int, logits: str = "logits") -> list[str]:
    """Return -i and -p of a case of a folder in nnU-Net's layout."""
    case = case_names(folder)[number]
    images = sorted((folder / "images").glob(f"{case}_????.nii.gz"))
    scores = min((folder / logits).glob(f"{case}.*"))
    return [*spread("-i", images), "-p", str(scores)]


def settings(text: str) -> list[str]:
    return spread("--set", text.split())


def small_folder(folder: Path, into: Path, cases: int) -> None:
    """Link the first cases of a data set into a folder of their own."""
    for name in ("images", "labels", "logits"):
        (into / name).mkdir(parents=True, exist_ok=True)
        for case in case_names(folder)[:cases]:
            for path in [*(folder / name).glob(f"{case}.*"), *(folder / name).glob(f"{case}_*")]:
                (into / name / path.name).symlink_to(path)


Run = tuple[str, list[list[str]]]  # the name of a run, and its commands, {} for their folder


def infer(case: list[str], *options: str) -> list[str]:
    return ["infer", *case, "-o", "{}/out", *options, "--threads", "2", "-q"]


def commands() -> Iterator[Run]:
    """Yield names of runs and their commands, one after the other in one folder."""
    yield from commands_of_parameters()
    yield from commands_of_formats()
    yield from commands_of_inputs()
    yield from commands_of_large_cases()
    yield from commands_of_refusals()
    yield from commands_of_folders()


def commands_of_parameters() -> Iterator[Run]:
    for number, logits in ((0, "logits"), (57, "logits_weak")):
        case = case_files(HIPPOCAMPUS, number, logits)
        for i, text in enumerate(SETS):
            more = [["--save-probabilities"], ["--save-logits"], []][i % 3]
            yield f"set {number} {text}", [infer(case, *settings(text), *more)]
        for preset in PRESETS:
            yield f"preset {number} {preset}", [infer(case, "-c", preset)]


def commands_of_formats() -> Iterator[Run]:
    case = case_files(HIPPOCAMPUS, 3)
    like = ["--like", case[1]]
    for suffix in FORMATS:
        save = ["--save-probabilities", "--save-logits"]
        yield f"format {suffix}", [infer(case, "--output-format", suffix, *save)]
        logits = f"{{}}/logits{suffix}"
        yield f"convert {suffix}", [["convert", case[-1], logits, *like], ["info", logits]]
        probabilities = f"{{}}/probabilities{suffix}"
        convert = ["convert", case[-1], probabilities, "--to", "probabilities", *like]
        yield f"convert probabilities {suffix}", [convert]
        labels = f"{{}}/labels{suffix}"
        convert = ["convert", case[-1], labels, "--to", "labels", *like]
        yield f"convert labels {suffix}", [convert]
        yield f"labels of {suffix}", [convert, infer([*case[:2], "-p", labels])]


def commands_of_inputs() -> Iterator[Run]:
    case = case_files(HIPPOCAMPUS, 3)
    for i, text in enumerate(OPTIONS):
        command = infer(case_files(HIPPOCAMPUS, i), *text.split())
        if "-t" in text:
            del command[-3:]
        yield f"option {text}", [command]
    convert = ["convert", case[-1], "{}/p.nii.gz", "--to", "probabilities"]
    front = "--regions whole=1+2 --regions front=1"
    back = "--regions whole=1+2 --regions back=2"
    for text in (front, back):
        yield f"regions {text}", [convert, infer([*case[:2], "-p", "{}/p.nii.gz"], *text.split())]
    images = sorted((ITK / "images").glob("*.mh[ad]"))
    scores = sorted((ITK / "logits").glob("*.mh[ad]"))
    for number in range(5):
        files = ["-i", str(images[number]), "-p", str(scores[number])]
        yield f"itk {number}", [infer(files, "--save-probabilities")]


def commands_of_large_cases() -> Iterator[Run]:
    everywhere = "-c brats --set mean_field.label_threshold=0"
    lattice = "--set mean_field.filter=lattice -m nonzero"
    for number, options in enumerate(("", "-c brats", lattice, everywhere)):
        yield f"brats {number} {options}", [infer(case_files(BRATS, number), *options.split())]
    tumor = case_files(BRATS, 1)
    convert = ["convert", tumor[-1], "{}/logits.nii", "--to", "logits"]
    for more in ("", " -c brats", " --set mean_field.label_threshold=0"):
        options = f"--max-memory 1100M{more}"
        streamed = infer([*tumor[:-2], "-p", "{}/logits.nii"], *options.split())
        yield f"streamed {options}", [convert, streamed]
    for number in (0, 7):
        for text in ("", "bilateral.theta_alpha=4", "volume.weight=0.5"):
            command = infer(case_files(ATRIUM, number), "--resample", *settings(text))
            yield f"atrium {number} {text}", [command]


def commands_of_refusals() -> Iterator[Run]:
    yield "refused grid", [infer(case_files(ATRIUM, 1))]
    wrong = ["mean_field.num_iterations=0", "bilateral.sigma=3", "spatial.weight=[1,2]"]
    for i, text in enumerate([*wrong, "mean_field.filter=best"]):
        yield f"refused {text}", [infer(case_files(HIPPOCAMPUS, i), *settings(text))]


def commands_of_folders() -> Iterator[Run]:
    link = f"link {shlex.quote(str(HIPPOCAMPUS))} 4"
    refine = "infer -i {}/in/images -p {}/in/logits -o {}/out --threads 2 -q"
    judge = "evaluate {}/out {}/in/labels -o {}/judged --threads 1 -q"
    compare = f"{judge} -b network={{}}/in/logits -i {{}}/in/images"
    status = "status {}/out"
    yield _lines(
        "folder", link, refine, f"{refine} --continue", status, compare, "status {}/judged"
    )
    yield _lines("folder regions", link, refine, f"{compare} -r whole=1+2")
    part = f"{refine} --num-parts 2 --part-id"
    yield _lines("folder parts", link, f"{part} 0", f"{part} 1", status)
    yield _lines("folder changed", link, refine, f"{refine} --continue -c hippocampus", judge)
    yield _lines("folder bad case", link, "spoil {}/in/logits", refine, f"{judge} --strict")
    train = "train-crf {}/in -o {}/crf.toml --threads 1 -q --num-iterations 3 --folds 2"
    for text in ("-c default", "-c brats --learn weights,theta,postprocess --seed 3"):
        yield _lines(f"train {text}", link, f"{train} {text}")


def _lines(name: str, *lines: str) -> Run:
    return name, [shlex.split(line) for line in lines]


def functions() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names and calls of the Python interface on cases in memory."""
    import nibabel as nib

    from crfrefine import CrfParameters, RegionScheme, refine

    names = case_files(HIPPOCAMPUS, 11)
    volume, scores = (nib.load(name) for name in (names[1], names[-1]))
    image = np.asarray(volume.dataobj, np.float32)
    spacing = tuple(float(x) for x in volume.header.get_zooms())
    logits = np.ascontiguousarray(np.moveaxis(np.asarray(scores.dataobj, np.float32), -1, 0))

    def call(logits: Any = logits, image: Any = image, **more: Any) -> Callable[[], Any]:
        def run() -> Any:
            found = refine(logits, image, **{"spacing": spacing, "threads": 2, **more})
            report = [found.report.energy, found.report.num_iterations]
            return [found.label_map, found.marginals, found.logits, *report]

        return run

    mask = image > np.median(image)
    yield "refine", call()
    yield "refine masked", call(mask=mask)
    yield "refine double", call(logits=logits.astype(np.float64), image=image.astype(np.float64))
    yield "refine half", call(logits=logits.astype(np.float16))
    yield "refine labels", call(logits=logits.argmax(axis=0).astype(np.uint8), input_type="labels")
    yield "refine plane", call(logits=logits[:, 15], image=image[15], spacing=spacing[1:])
    yield "refine two images", call(image=np.stack([image, np.sqrt(np.abs(image))]))
    regions = RegionScheme.of({"outer": [1, 2], "inner": 2})
    yield "refine regions", call(logits=logits[1:] - logits[:1], regions=regions)
    spatial = CrfParameters().replace(**{"spatial.weight": 2, "mean_field.temperature": 2})
    yield "refine spatial", call(parameters=spatial, mask=mask)
    rows = np.minimum(np.arange(image.shape[0]) // 4, 9)
    columns = np.minimum(np.arange(image.shape[1]) // 4, 12)
    many = np.arange(130).reshape(10, 13)[np.ix_(rows, columns)]
    atlas = np.ascontiguousarray(np.broadcast_to(many[..., None], image.shape)).astype(np.uint8)
    yield "refine 130 labels", call(logits=atlas, input_type="labels")
    yield "refine 130 labels masked", call(logits=atlas, input_type="labels", mask=mask)

    def layer() -> Any:
        import torch

        from crfrefine import CrfRnn

        module = CrfRnn(num_labels=len(logits), num_modalities=1)
        scores = torch.from_numpy(logits[None]).requires_grad_()
        refined = module(scores, torch.from_numpy(image[None, None]), spacing=spacing)
        refined[:, 1].square().mean().backward()
        gradients = [leaf.grad for leaf in (scores, *module.parameters())]
        known = [gradient.numpy() for gradient in gradients if gradient is not None]
        return [refined.detach().numpy(), *known]

    yield "layer", layer


def digest(value: Any) -> str:
    """Return a short hash of an array, or of what json can write."""
    if isinstance(value, np.ndarray):
        data = str((value.dtype.str, value.shape)).encode() + np.ascontiguousarray(value).tobytes()
    elif isinstance(value, bytes):
        data = value
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# What differs from run to run: times, sizes of memory, names of temporary files, dates, versions.
_CHANGES = re.compile(
    r"second|time|date|host|memory|version|bytes|command|pid|processor|machine|user|_at$|digest|sha"
    r"|threads|file|folder|source|size|^run$|started"
)
_UNITS = r"\d+(\.\d+)?(ms|s|min|MiB|GiB|KiB|MB|GB|kB)\b"
_WHEN_AND_WHERE = re.compile(rf"TMP[\w/.-]*|{_UNITS}|\d{{4}}-\d\d-\d\dT?[\d:.+]*")
_NOT_READ = (".html", ".log", ".md", ".txt", ".pt", ".lock")


def without_changes(value: Any, folder: str) -> Any:
    """Return a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        kept = [key for key in value if not _CHANGES.search(str(key).lower())]
        return {key: without_changes(value[key], folder) for key in kept}
    if isinstance(value, list):
        return [without_changes(entry, folder) for entry in value]
    if isinstance(value, str):
        return plain(value, folder)
    return value


def plain(text: str, folder: str) -> str:
    """Return a message without places of files, times and sizes."""
    return _WHEN_AND_WHERE.sub("#", re.sub(r"\s+", "", text.replace(folder, "TMP")))


def read(path: Path, folder: str) -> Any:
    """Return what counts of a file: voxels and headers as bytes, tables, texts.

    None where each run writes something else.
    """
    if path.suffix in _NOT_READ or path.name.startswith("."):
        return None
    data = path.read_bytes()
    if path.suffix in (".gz", ".mgz"):
        return gzip.decompress(data)
    if path.suffix == ".npz":
        with np.load(path) as opened:
            return {name: digest(opened[name]) for name in sorted(opened.files)}
    if path.suffix == ".json":
        return without_changes(json.loads(data), folder)
    if path.suffix == ".jsonl":
        entries = [without_changes(json.loads(line), folder) for line in data.splitlines()]
        return sorted(json.dumps(entry, sort_keys=True) for entry in entries)
    if path.suffix in (".csv", ".toml"):
        lines = data.decode().splitlines()
        kept = [line for line in lines if not _CHANGES.search(line.split("=")[0].lower())]
        return plain("\n".join(kept), folder)
    return data


def run_commands(lines: list[list[str]], folder: Path) -> dict[str, str]:
    """Run commands one after the other in one folder; return hashes of what they wrote and said."""
    found = {}
    for i, line in enumerate(lines):
        arguments = [word.replace("{}", str(folder)) for word in line]
        if arguments[0] == "link":
            small_folder(Path(arguments[1]), folder / "in", int(arguments[2]))
        elif arguments[0] == "spoil":
            link = sorted(Path(arguments[1]).iterdir())[1]
            data = link.read_bytes()[:5000]
            link.unlink()
            link.write_bytes(data)
        else:
            status, said = run_command(arguments)
            found[f"{i} said"] = digest(plain(said, str(folder)))
            found[f"{i} status"] = str(status)
    for path in sorted(folder.rglob("*")):
        # Inputs are links; what `evaluate` keeps of each case has the state of its files.
        is_input = folder / "in" in path.parents or path.parent.name == "cases"
        if path.is_file() and not is_input:
            value = read(path, str(folder))
            if value is not None:
                name = re.sub("run-[0-9a-f]{8}", "run", str(path.relative_to(folder)))
                found[name] = digest(value)
    return found


def run_command(arguments: list[str]) -> tuple[object, str]:
    """Run a command in this process; return its exit status and what it said."""
    from crfrefine.cli.main import main

    status: object = 0
    said = io.StringIO()  # The command replaces a standard output that is a file.
    with redirect_stdout(said), redirect_stderr(said):
        sys.argv = ["crfrefine", *arguments]
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    return status, said.getvalue()


def _work(name: str, lines: list[list[str]] | None, into: Any) -> None:
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    os.chdir(folder)
    try:
        if lines is None:
            into.send({str(i): digest(value) for i, value in enumerate(dict(functions())[name]())})
        else:
            into.send(run_commands(lines, folder))
    except Exception as error:
        into.send({"": repr(error)})
    finally:
        shutil.rmtree(folder)


def run_all(words: list[str]) -> dict[str, dict[str, str]]:
    """Run everything whose name has one of the words, each in a process of its own."""
    context = multiprocessing.get_context("fork")
    runs = [*commands(), *((name, None) for name, _ in functions())]
    results = {}
    for name, lines in runs:
        if words and not any(word in name for word in words):
            continue
        ours, theirs = context.Pipe(False)
        process = context.Process(target=_work, args=(name, lines, theirs))
        process.start()
        theirs.close()
        try:
            results[name] = ours.recv()
        except EOFError:
            results[name] = {"": "it ended without a result"}
        process.join()
        print(f"\r{len(results)} of {len(runs)}  {name[:60]:60}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return results


def main() -> int:
    """Record or compare; return 1 where something is different."""
    what, file, *words = sys.argv[1:]
    results = run_all(words)
    if what == "record":
        Path(file).write_text(json.dumps(results, indent=1))
        print(f"{len(results)} runs, {sum(map(len, results.values()))} hashes")
        return 0
    before = json.loads(Path(file).read_text())
    different = 0
    for name, found in results.items():
        old = before.get(name, {})
        for key in sorted(old.keys() | found.keys()):
            if old.get(key) != found.get(key):
                different += 1
                print(f"{name}: {key}: {old.get(key)} before, {found.get(key)} now")
    print(f"{len(results)} runs, {different} differences")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
