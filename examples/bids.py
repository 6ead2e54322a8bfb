"""Refine the segmentations in derivatives of a BIDS dataset into a derived dataset.

    python examples/bids.py dataset network refined --modality T1w --modality FLAIR -c brats

`network` is a folder under dataset/derivatives. Other options go to `crfrefine infer`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import crfrefine


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifest, call `crfrefine infer`, write the JSON files; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", type=Path, help="the BIDS dataset with the images")
    parser.add_argument("network", help="the folder of the segmentations under dataset/derivatives")
    parser.add_argument("output", type=Path, help="the derived dataset to write")
    parser.add_argument(
        "--modality",
        action="append",
        metavar="SUFFIX",
        help="suffix of an image; repeatable, in order; default: T1w",
    )
    parser.add_argument(
        "--suffix",
        default="probseg",
        help="dseg for label maps, with --input-type labels; default: probseg",
    )
    given, options = parser.parse_known_args(arguments)
    network = given.dataset / "derivatives" / given.network
    rows = [
        row_of(path, given.dataset, network, given.modality or ["T1w"])
        for path in segmentations_of(network, given.suffix)
    ]
    if not rows:
        parser.error(f"{network}: expected files sub-*/**/*_{given.suffix}.nii.gz")
    write_description(given.output, given.dataset)
    manifest = given.output / "code" / "cases.csv"  # BIDS leaves the folder to programs.
    manifest.parent.mkdir(exist_ok=True)
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    command = [
        sys.executable,
        "-m",
        "crfrefine",
        "infer",
        "--manifest",
        str(manifest),
        "-o",
        str(given.output),
        *options,
    ]
    status = subprocess.run(command, check=False).returncode
    for row in rows:
        write_sidecar(
            given.output / row["output"], given.dataset, [*row["images"].split(";"), row["logits"]]
        )
    return status


def segmentations_of(network: Path, suffix: str) -> list[Path]:
    """Return the segmentations of all subjects."""
    return sorted(network.glob(f"sub-*/**/*_{suffix}.nii.gz"))


def row_of(
    segmentation: Path, dataset: Path, network: Path, modalities: Sequence[str]
) -> dict[str, str]:
    """Return the row of the manifest.

    Images have the name of the segmentation, without `desc` and with another suffix.
    """
    folder = segmentation.parent.relative_to(network)
    entities = [part for part in segmentation.name.split("_")[:-1] if not part.startswith("desc-")]
    name = "_".join(entities)
    images = [(dataset / folder / f"{name}_{modality}.nii.gz").resolve() for modality in modalities]
    output = folder / f"{name}_desc-crf_dseg.nii.gz"
    return {
        "case": name,
        "images": ";".join(map(str, images)),
        "logits": str(segmentation.resolve()),
        "output": str(output),
    }


def write_description(output: Path, dataset: Path) -> None:
    """Write dataset_description.json of the derived dataset, if there is none.

    "raw" is the link to the dataset.
    """
    raw = json.loads((dataset / "dataset_description.json").read_text(encoding="utf-8"))
    described = {
        "Name": f"{raw['Name']}: refined with a dense CRF",
        "BIDSVersion": raw["BIDSVersion"],
        "DatasetType": "derivative",
    }
    described["GeneratedBy"] = [{"Name": "crfrefine", "Version": crfrefine.__version__}]
    described["DatasetLinks"] = {"raw": os.path.relpath(dataset, output)}
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "dataset_description.json").exists():
        write_json(output / "dataset_description.json", described)


def write_sidecar(label_map: Path, dataset: Path, sources: Sequence[str]) -> None:
    """Write the JSON file beside a label map that was refined: what it was made from."""
    if label_map.is_file():
        paths = [Path(source).relative_to(dataset.resolve()).as_posix() for source in sources]
        write_json(
            label_map.with_name(label_map.name.replace(".nii.gz", ".json")),
            {"Sources": [f"bids:raw:{path}" for path in paths]},
        )


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
