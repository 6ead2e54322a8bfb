"""`crfrefine tune` as users start it: bad input is an error before a page opens, and only those who know the address get the page."""

import json
import signal
import socket

import numpy as np
import pytest
from cli_helpers import run_here, save_nifti
from tune_helpers import missing_server, open_page

from crfrefine.runs.tune import server

needs_server = pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server")


def arguments(labeled_folders):
    return "-i", labeled_folders[0].images, "-p", labeled_folders[0].logits, "-l", labeled_folders[1]


def test_without_the_extra_the_error_names_it(monkeypatch, labeled_folders):
    monkeypatch.setattr(server, "_LIBRARIES", ("a_server_that_is_not_there",))
    done = run_here("tune", *arguments(labeled_folders), status=1)
    assert done.stderr.splitlines() == [
        "crfrefine: error: the page of tune needs a_server_that_is_not_there: pip install 'crfrefine[tune]'"
    ]


@needs_server
def test_bad_inputs_are_told_in_a_line_and_no_page_opens(labeled_folders, tmp_path):
    images, logits, labels = ("-i", labeled_folders[0].images), ("-p", labeled_folders[0].logits), ("-l", labeled_folders[1])
    other = save_nifti(tmp_path / "first_0000.nii.gz", np.zeros((4, 5, 6)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for given, text in (
            ((*images, "--case", "third"), "--case third: no such case; there are first, second"),
            ((*images, "-c", "nowhere"), "nowhere: no such file or preset"),
            ((*images, "-l", "nowhere"), "nowhere"),
            ((*images, *labels, "-o", "/proc/params.toml"), "cannot be written: "),
            ((*images, "--device", "cuda:77"), "--device cuda:77"),
            ((*images, "--regions", "whole=1+2+3", "--regions-class-order", "1"), "sigmoid channels"),
            ((*images, "--max-memory", "9KiB"), "Crop the volume, or raise it"),
            ((*images, "--no-browser", "--port", taken.getsockname()[1]), "any free port is taken"),
            (("-i", other, "-p", labeled_folders[0].logits / "first.nii.gz"), "different grids"),
        ):
            done = run_here("tune", *given, *(() if "-p" in given else logits))
            assert (done.status, done.stdout) == (1, "")
            assert text in done.stderr, given


STATE = {"counter": 1, "preset": "", "changes": {}, "place": [0, 0, 0], "is_whole": True}
SENSELESS = (
    *(b"", b"[]", b"{}", b"[" * 9999, {**STATE, "more": 1}, {**STATE, "counter": "1"}, {**STATE, "changes": 3}),
    *({**STATE, "changes": {"a": 1}}, {**STATE, "place": "x"}, {**STATE, "place": [0, 0, "x"]}, {**STATE, "preset": []}),
)


@needs_server
def test_only_the_right_address_gets_answers_and_they_forbid_what_the_page_does_not_need(labeled_folders):
    with open_page(*arguments(labeled_folders)) as page:
        assert page.ask("describe")[0] == 200
        for token in ("", "x", page.address.split("/")[3][:-1]):
            status, content, _ = page.ask("describe", token=token)
            assert status == 403
            assert b"first" not in content
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            assert page.ask("describe", host=host)[0] == 400
        assert page.ask("describe", host="localhost:8000")[0] == 200, "as through a tunnel"
        for name in ("", "tune.js", "describe", "nowhere", "plane/0?9"):
            _, _, headers = page.ask(name)
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
        for sent in SENSELESS:
            status, content, _ = page.ask("refine", sent)
            assert (status, bool(json.loads(content)["error"])) == (400, True), sent
        page.json("refine", STATE)
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(30) == 130
        told = page.process.stderr.read().splitlines()
        assert told[-1] == "crfrefine: interrupted"
        assert all(line.startswith("crfrefine: ") for line in told)
