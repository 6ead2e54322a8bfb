"""Some thousand mutations of each kind of file: a result or one of our errors, with a message that a terminal can show.

Not for MetaImage, NRRD and NIfTI, whose tests have hypotheses of their own. `CRFREFINE_FUZZ=20000` makes as many of each.
"""

from __future__ import annotations

import os
import random
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz import archives, descriptions, mutated, seeds, write

from crfrefine import io
from crfrefine.cases.discovery import discover_cases, read_dataset_description
from crfrefine.errors import CrfRefineError, UnexpectedError
from crfrefine.metrics.regions import read_regions, regions_from_labels
from crfrefine.parameters.model import CrfParameters, configs_dir, parse_override
from crfrefine.text import for_terminal

NUM_MUTATIONS = int(os.environ.get("CRFREFINE_FUZZ", "2000"))
MOST_OF_A_MESSAGE = 2000


def survives(work: Callable[[], object]) -> bool:
    """Return whether the file was taken; fails where anything but an expected error comes out of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work()
    except UnexpectedError as error:
        raise AssertionError(f"a reader raised {error.__cause__!r}") from error
    except CrfRefineError as error:
        require_readable(error)
        return False
    return True


def require_readable(error: CrfRefineError) -> None:
    message = str(error)
    assert message, type(error)
    assert len(message) < MOST_OF_A_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert for_terminal(message) == message, f"not for a terminal: {message!r:.300}"


def run(work: Callable[[random.Random], object]) -> int:
    """Return how many mutated files were taken."""
    taken = 0
    for seed, rng in seeds(NUM_MUTATIONS):
        try:
            taken += survives(lambda rng=rng: work(rng))
        except BaseException as error:
            error.add_note(f"mutation {seed}")
            raise
    return taken


def test_archives(tmp_path: Path) -> None:
    def work(rng: random.Random) -> None:
        path = write(tmp_path / "a.npz", mutated(rng.choice(archives(rng)), rng))
        header = io.read_header(path)
        values = io.allocate(header)
        io.read_into(header, values)
        assert np.isfinite(values).all()

    assert 0 < run(work) < NUM_MUTATIONS


def test_descriptions(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a_0000.nii").touch()

    def work(rng: random.Random) -> None:
        content = descriptions(rng)
        path = write(tmp_path / "dataset.json", content if rng.random() < 0.3 else mutated(content, rng))
        for note in discover_cases(images, None).notes:
            assert for_terminal(note) == note
            assert len(note) < MOST_OF_A_MESSAGE
        found = read_dataset_description(images)
        assert found is not None
        assert all(isinstance(name, str) for name in (*found.labels, *found.channel_names))
        regions_from_labels(found.labels)
        read_regions(path)

    assert 0 < run(work) < NUM_MUTATIONS


def test_parameter_files(tmp_path: Path) -> None:
    presets = [path.read_bytes() for path in sorted(configs_dir().glob("*.toml"))]

    def work(rng: random.Random) -> None:
        parameters = CrfParameters.load(write(tmp_path / "p.toml", mutated(rng.choice(presets), rng)))
        assert CrfParameters.from_toml(parameters.to_toml()) == parameters

    assert 0 < run(work) < NUM_MUTATIONS


def test_overrides() -> None:
    keys = [
        f"{section}.{key}" for section, table in tomllib.loads(CrfParameters().to_toml()).items() if section != "schema" for key in table
    ]
    values = (b"4.0", b"[1, 2.5]", b"percentile", b"[[0, 1], [1, 0]]", b'["none", "zscore"]', b"-0.0")

    def work(rng: random.Random) -> None:
        text = f"{rng.choice(keys)}=".encode() + rng.choice(values)
        key, value = parse_override(mutated(text, rng).decode("utf-8", "surrogateescape"))
        CrfParameters().replace(**{key: value})

    assert 0 < run(work) < NUM_MUTATIONS


@pytest.mark.parametrize("seed", range(3))
def test_a_mutation_is_made_again_by_its_number(seed: int) -> None:
    first, second = (mutated(descriptions(rng), rng) for rng in (random.Random(seed), random.Random(seed)))
    assert first == second
