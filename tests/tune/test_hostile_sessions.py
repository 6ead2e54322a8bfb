"""Random sessions on the page of `tune` in which everything happens that may.

Strokes, undo and redo from two browsers, requests that are cut off and sent again, slow ones, ends
of the program at any moment, parameters, saves, notes, and other programs on the same files.
After each step the strokes are those that a simple model has, and in the end what the page shows,
what its files have and what `infer --strokes` gives are the same, bit for bit.
CRFREFINE_TEST_SESSIONS sets how many there are.
"""

import json
import os
import random
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from cli_helpers import run_here, save_nifti
from tune_helpers import missing_server, open_page, write_labeled

from crfrefine.io import read_volume, write_label_map
from crfrefine.pictures.planes import upright_axes

NUM_SESSIONS = int(os.environ.get("CRFREFINE_TEST_SESSIONS", "8"))
NUM_STEPS = 25
GRID = (15, 18, 11)  # of the cases, upright
CASES = ("a", "b", "c")
KINDS = ("logits", "labels")
LABELS = (1, 2, 3, 255, 0)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server"),
]


@dataclass
class Strokes:
    """What the model knows of a case: its strokes now, before and after."""

    done: list = field(default_factory=list)
    undone: list = field(default_factory=list)


class Hostile:
    """A running page, the model of its cases, and what happens to them."""

    def __init__(self, arguments, folder, seed):
        self.arguments = arguments
        self.folder = folder
        self.random = random.Random(seed)
        self.cases = [Strokes() for _ in CASES]
        self.notes = ["" for _ in CASES]
        self.num_marks = 0
        self.last = None  # the edit that was sent last
        self.start()
        for number, case in enumerate(self.cases):
            self.page.json("open", {"number": number})
            case.done.append(self.drawn(number))

    def start(self):
        self.manager = open_page(*self.arguments, "--corrections", self.folder)
        self.page = self.manager.__enter__()

    def stop(self):
        self.manager.__exit__(None, None, None)

    # ---- What the page shows

    def layers(self, number):
        """The label maps of the open case, upright."""
        volumes = {}
        for through in range(GRID[2]):
            view = {"plane": 0, "place": [0, 0, through], "modality": 0, "is_known": True}
            _, content, _ = self.page.ask(f"case/{number}/plane/0?{quote(json.dumps(view))}")
            line, _, arrays = content.partition(b"\n")
            header = json.loads(line)
            shape = (header["rows"], header["columns"])
            start = 0
            for name, kind in header["layers"]:
                values = np.frombuffer(arrays, f"<{kind}", shape[0] * shape[1], start)
                start += values.nbytes
                planes = volumes.setdefault(name, np.zeros(GRID, np.uint16))
                planes[:, :, through] = values.reshape(shape)[::-1].T
        return volumes

    def drawn(self, number):
        """The strokes of a case, which is opened."""
        self.page.json("open", {"number": number})
        return self.layers(number)["strokes"]

    def upright(self, path):
        volume = read_volume(path)
        axes = upright_axes(volume.header.geometry()[0], volume.data.ndim)
        return axes.apply(volume.data).astype(np.uint16)

    # ---- Requests

    def mark(self):
        self.num_marks += 1
        return f"mark {self.num_marks}"

    def stroke(self):
        place = [self.random.randrange(length) for length in GRID]
        start = [self.random.randrange(-1, 15), self.random.randrange(-1, 15)]
        path = list(start)
        for _ in range(self.random.randrange(3)):
            path += [at + self.random.randint(-4, 4) for at in start]
        return {
            "plane": self.random.randrange(3),
            "place": place,
            "path": path,
            "value": self.random.choice(LABELS),
            "shape": self.random.choice(("disk", "ball", "outline")),
            "radius": self.random.choice((0.0, 1.5)),
            "within": {},
            "mark": self.mark(),
        }

    def send_badly(self, name, sent):
        """Send a request slowly, and perhaps leave before its answer."""
        parts = urlsplit(self.page.address)
        body = json.dumps(sent).encode()
        head = (
            f"POST {parts.path}{name} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError), socket.create_connection((parts.hostname, parts.port)) as link:
            link.sendall(head.encode() + body[: len(body) // 2])
            time.sleep(self.random.choice((0, 0.05)))
            if self.random.random() < 0.5:
                link.sendall(body[len(body) // 2 :])
                time.sleep(self.random.choice((0, 0.02)))

    def edit(self, number, name, sent):
        """Do an edit, perhaps after requests that fail, or an end of the program, or twice."""
        address = f"case/{number}/{name}"
        trouble = self.random.random()
        if trouble < 0.3:
            self.send_badly(address, sent)
        elif trouble < 0.4:
            self.kill(lambda: self.page.ask(address, sent))
        answer = self.page.json(address, {**sent, "case": CASES[number]})
        if trouble > 0.8:
            answer = self.page.json(address, sent)
        self.last = (address, sent)
        return answer

    def kill(self, act):
        """End the program at once, a moment after something was begun, and start it again."""

        def begin():
            with suppress(OSError, AssertionError, ValueError, HTTPException):
                act()

        thread = threading.Thread(target=begin)
        thread.start()
        time.sleep(self.random.choice((0, 0.002, 0.01, 0.05, 0.2)))
        address = self.page.address
        self.page.process.kill()
        thread.join(60)
        self.stop()
        self.start()
        assert self.page.address == address

    # ---- Steps

    def draw(self, number):
        self.edit(number, "draw", self.stroke())
        self.take(number)

    def take(self, number):
        """Take the strokes that are done now, if there are more; one outside the grid is none."""
        case = self.cases[number]
        values = self.drawn(number)
        path = self.folder / "drawing" / f"{CASES[number]}.json"
        if path.exists() and json.loads(path.read_text())["done"] >= len(case.done):
            case.done.append(values)
            case.undone.clear()

    def undo(self, number):
        case = self.cases[number]
        self.edit(number, "undo", {"mark": self.mark()})
        if len(case.done) > 1:
            case.undone.append(case.done.pop())

    def redo(self, number):
        case = self.cases[number]
        self.edit(number, "redo", {"mark": self.mark()})
        if case.undone:
            case.done.append(case.undone.pop())

    def repeat(self, number):
        """An edit that was done long ago arrives again, from another browser."""
        if self.last is not None:
            self.page.json(*self.last)

    def refine(self, number):
        """Two browsers whose clocks differ ask for results."""
        self.page.json("open", {"number": number})
        for _ in range(2):
            state = {
                "counter": self.random.choice((0, 5, -3, 10**13)),
                "preset": "case",
                "changes": self.random.choice(({}, {"bilateral.weight": self.random.random() * 9})),
                "place": [self.random.randrange(size) for size in GRID],
                "is_whole": self.random.random() < 0.5,
            }
            self.page.json(f"case/{number}/refine", state)

    def save(self, number):
        sent = {"preset": "case", "changes": {}}
        address = f"case/{number}/save-case"
        if self.random.random() < 0.4:
            self.kill(lambda: self.page.ask(address, sent))
        self.page.json(address, sent)

    def change_outside(self, number):
        """Another program draws in the file of strokes."""
        path = self.folder / "strokes" / f"{CASES[number]}.nii.gz"
        if not path.exists():
            return
        merged = self.drawn(number)
        before = self.upright(path)
        volume = read_volume(path)
        values = volume.data.astype(np.uint8)
        corner = [self.random.randrange(size - 2) for size in values.shape]
        box = tuple(slice(at, at + 2) for at in corner)
        values[box] = 2
        write_label_map(path, values, volume.header)
        axes = upright_axes(volume.header.geometry()[0], 3)
        outside = axes.apply(values).astype(np.uint16)
        merged[outside != before] = 2
        if self.random.random() < 0.5:
            self.page.json("open", {"number": number})
            assert self.page.json(f"case/{number}/look", {"mark": ""})
        else:
            self.page.json("open", {"number": (number + 1) % len(CASES)})
        np.testing.assert_array_equal(self.drawn(number), merged)
        self.take(number)

    def note(self, number):
        self.notes[number] = f"note {self.random.randrange(1000)}"
        sent = {"number": number, "review": None, "note": self.notes[number]}
        if self.random.random() < 0.3:
            self.send_badly("review", sent)
        self.page.json("review", sent)

    def note_outside(self, number):
        path = self.folder / "reviews.csv"
        if path.exists() and self.notes[number]:
            text = path.read_text()
            path.write_text(text.replace(f"{CASES[number]},to do,", f"{CASES[number]},done,"))

    def end(self, number):
        self.kill(lambda: self.page.json("cases"))

    def check(self, number):
        """The strokes are those of the model, whichever case is open."""
        np.testing.assert_array_equal(self.drawn(number), self.cases[number].done[-1])

    def save_all(self):
        self.page.json("save-all", {"preset": "case", "changes": {}})
        while self.page.json("cases")["is_saving"]:
            time.sleep(0.05)


STEPS = {
    "draw": 12,
    "undo": 5,
    "redo": 3,
    "repeat": 2,
    "refine": 3,
    "save": 3,
    "change_outside": 2,
    "note": 2,
    "note_outside": 1,
    "end": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three cases with logits, and the same with label maps."""
    root = tmp_path_factory.mktemp("cases")
    folders, labels = write_labeled(root, *CASES)
    for name in CASES:
        network = read_volume(labels / f"{name}.nii.gz").data
        save_nifti(root / "network" / f"{name}.nii.gz", np.roll(network, 1, axis=0))
    return {
        "logits": ("-i", folders.images, "-p", folders.logits, "-c", "default"),
        "labels": ("-i", folders.images, "-p", root / "network", "-c", "default"),
    }


@pytest.mark.parametrize("seed", range(NUM_SESSIONS))
def test_page_files_and_infer_agree_whatever_happens(inputs, tmp_path, seed):
    arguments = inputs[KINDS[seed % len(KINDS)]]
    folder = tmp_path / "corrections"
    hostile = Hostile(arguments, folder, seed)
    try:
        for _ in range(NUM_STEPS):
            (name,) = hostile.random.choices([*STEPS], [*STEPS.values()])
            number = hostile.random.randrange(len(CASES))
            getattr(hostile, name)(number)
            hostile.check(number)
        hostile.save_all()
        listed = hostile.page.json("cases")
        assert listed["refused"] == ""
        assert [case["note"] for case in listed["cases"]] == hostile.notes
        for number, name in enumerate(CASES):
            hostile.check(number)
            if not (folder / "strokes" / f"{name}.nii.gz").exists():
                continue
            if listed["cases"][number]["state"] != "saved":
                assert listed["cases"][number]["state"] == "outdated"
                hostile.page.json(f"case/{number}/save-case", {"preset": "case", "changes": {}})
            state = {"counter": 0, "preset": "case", "changes": {}, "place": [0, 0, 0]}
            answer = hostile.page.json(f"case/{number}/refine", {**state, "is_whole": False})
            counter = answer["counter"]
            hostile.page.json(
                f"case/{number}/refine", {**state, "counter": counter, "is_whole": True}
            )
            shown = hostile.layers(number)
            kept = hostile.upright(folder / "strokes" / f"{name}.nii.gz")
            np.testing.assert_array_equal(shown["strokes"], kept)
            refined = read_volume(folder / "refined" / f"{name}.nii.gz").data
            np.testing.assert_array_equal(
                shown["refined"], hostile.upright(folder / "refined" / f"{name}.nii.gz")
            )
            out = tmp_path / f"out-{name}"
            given = ("-c", folder / "parameters" / f"{name}.toml", "--strokes", folder / "strokes")
            run_here("infer", *arguments[:4], *given, "-o", out, "--threads", 1, status=0)
            np.testing.assert_array_equal(refined, read_volume(out / f"{name}.nii.gz").data)
    finally:
        hostile.stop()
    shutil.rmtree(tmp_path, ignore_errors=True)
