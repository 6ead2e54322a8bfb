"""A phantom on disk for the page of `crfrefine tune`, the page as a process, and requests to it."""

import contextlib
import http.client
import importlib.util
import itertools
import json
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from cli_helpers import AFFINE, GRID_SHAPE, SPACING, Folders, command, save_nifti, write_folders

from crfrefine.demo.phantom import make_phantom
from crfrefine.infer.options import InferenceOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.chosen import ChosenParameters
from crfrefine.tune.finding import find_cases_to_show, number_of_first
from crfrefine.tune.options import TuneOptions
from crfrefine.tune.session import Session


def missing_server():
    """Why the page cannot be served here; empty if it can."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    return f"no {' and no '.join(missing)}: the extra `tune` brings them" if missing else ""


def write_labeled(root, *case_ids):
    """Write small cases and their references."""
    folders = write_folders(root, *case_ids)
    for seed, case_id in enumerate(case_ids):
        save_nifti(
            root / "labels" / f"{case_id}.nii.gz", make_phantom(seed, GRID_SHAPE, SPACING).labels
        )
    return folders, root / "labels"


def options_for(folders, labels=None, *, output=None, **changes):
    parameters = CrfParameters().replace(
        **{"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1, **changes}
    )
    inputs = InferenceOptions(
        (folders.images,), (folders.logits,), Path(), parameters=parameters, threads=1, preview=True
    )
    return TuneOptions(inputs, labels, output)


def write_large(root):
    """Write a case that is larger than what is refined at once, turned so that x of the array is
    not x of the world.
    """
    folders = Folders(root / "images", root / "logits", root / "out")
    phantom = make_phantom(3, (76, 52, 60), SPACING)
    save_nifti(folders.images / "large_0000.nii.gz", phantom.image[0].astype(np.int16), AFFINE)
    save_nifti(folders.logits / "large.nii.gz", np.moveaxis(phantom.logits, 0, -1), AFFINE)
    return folders, save_nifti(root / "labels" / "large.nii.gz", phantom.labels, AFFINE)


def write_islands(root):
    """Write a case in space and a flat one: a bright ball, half of which the network misses, an
    island of the same label in gray, and one of another label. Return their folders by name.
    """
    grid = (21, 26, 17)
    spacing = (1.0, 2.5, 2.0)

    def ball(center, radius):
        away = (np.indices(grid) - np.reshape(center, (3, 1, 1, 1))).T * spacing
        distance = np.linalg.norm(away, axis=-1).T
        return distance <= radius

    bright = ball((9, 12, 8), 8.0)
    labels = np.zeros(grid, np.uint8)
    labels[bright & (np.indices(grid)[2] < 8)] = 1
    labels[ball((17, 22, 6), 3.0)] = 1
    labels[ball((3, 3, 6), 3.0)] = 2
    image = 100.0 * bright + np.random.default_rng(1).normal(0, 2, grid)
    image[14:, 18:] += 60
    # x of the array is not x of the world, and z runs the other way.
    affine = np.array([[0, 2.5, 0, 5], [1.0, 0, 0, 7], [0, 0, -2.0, 9], [0, 0, 0, 1]])
    flat = np.diag([*spacing[:2], 1.0, 1.0])
    found = {}
    for name, cut, shown in (("space", np.s_[:], affine), ("flat", np.s_[..., 6], flat)):
        folder = Folders(root / name / "images", root / name / "labels", root / name / "out")
        save_nifti(folder.images / "a_0000.nii.gz", image[cut].astype(np.float32), shown)
        save_nifti(folder.logits / "a.nii.gz", labels[cut], shown)
        found[name] = folder
    return found


class Page(NamedTuple):
    """A running page."""

    address: str
    process: subprocess.Popen[str]

    def ask(self, name, sent=None, *, token=None, host=None, origin=None):
        """Send a request; return status, content and headers."""
        parts = urlsplit(self.address)
        path = parts.path if token is None else f"/{token}/"
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        headers = {} if host is None else {"Host": host}
        if origin is not None:
            headers["Origin"] = origin
        body = None if sent is None else sent if isinstance(sent, bytes) else json.dumps(sent)
        with contextlib.closing(connection):
            connection.request("GET" if sent is None else "POST", path + name, body, headers)
            answer = connection.getresponse()
            return (
                answer.status,
                answer.read(),
                {key.lower(): value for key, value in answer.getheaders()},
            )

    def json(self, name, sent=None):
        status, content, _ = self.ask(name, sent)
        assert status == 200, content
        return json.loads(content)


@contextmanager
def open_page(*arguments, env=None):
    """Start the command, and end it afterwards unless it has ended."""
    words = command("tune", "--no-browser", "--threads", 1, *arguments)
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1]
        yield Page(address, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def new_session(options):
    """The case to show first, without a server."""
    inputs = find_cases_to_show(options)
    chosen = ChosenParameters(options.inputs.parameters, options.output)
    if options.corrections is not None:
        chosen.keep_in(options.corrections)
    return Session(options, inputs, number_of_first(inputs, options), None, chosen)


@contextmanager
def open_session(options):
    """A page without a server, ended afterwards."""
    session = new_session(options)
    try:
        yield session
    finally:
        session.results.is_left = True


_COUNTER = itertools.count(1)


def whole_result(session, changes=(), preset=""):
    """Refine the whole case with these parameters, as the newest state."""
    place = session.case.first_place()
    return session.refine(next(_COUNTER), preset, dict(changes), place, is_whole=True)["result"]


# As the page sends it.
STROKE = {
    "plane": 1,
    "place": [4, 5, 6],
    "path": [5, 2, 6, 2],
    "shape": "disk",
    "value": 3,
    "radius": 0.0,
    "within": {},
    "mark": "",
}

# The parameters that the page was opened with.
UNCHANGED = {"preset": "", "changes": {}}


def states(worklist):
    return [entry["state"] for entry in worklist.describe()["cases"]]
