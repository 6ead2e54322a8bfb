"""A folder run tells the engine of each case as soon as it is read; where the engine has a GPU, it begins to copy it."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from cli_helpers import save_nifti, write_folders

from crfrefine.engines.cpu import CpuBackend
from crfrefine.errors import CapacityError
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.run import run_inference


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the engine is told, in order: arrays to copy, and those that it is then given."""
    events: list[tuple[Any, ...]] = []
    hold = CpuBackend.hold

    def copy_ahead(self: CpuBackend, logits: Any = None, image: Any = None) -> None:
        events.append(("copy", logits, image, threading.current_thread().name))

    def held(self: CpuBackend, channels: Any) -> Any:
        events.append(("hold", channels))
        return hold(self, channels)

    def held_image(self: CpuBackend, image: Any) -> Any:
        events.append(("image", image))
        return image

    monkeypatch.setattr(CpuBackend, "copy_ahead", copy_ahead)
    monkeypatch.setattr(CpuBackend, "hold", held)
    monkeypatch.setattr(CpuBackend, "hold_image", held_image)
    return events


def is_same(one: Any, other: Any) -> bool:
    """Whether two arrays are one place in memory, seen in the same way."""
    return one.__array_interface__ == other.__array_interface__ and one.strides == other.strides


def test_what_is_told_is_what_is_computed(told: list[tuple[Any, ...]], tmp_path: Any) -> None:
    """The same memory in C order, in the reading thread, one case ahead; at the end nothing is to be kept."""
    folders = write_folders(tmp_path, "a", "b", "c")
    save_nifti(folders.images / "b_0000.nii.gz", np.zeros((4, 5, 6), np.int16))  # another grid: this case fails when it is read
    run_inference(InferenceOptions(images=(folders.images,), logits=(folders.logits,), output=folders.output, device="cpu"))
    copied = [event for event in told if event[0] == "copy"]
    assert len(copied) == 3
    assert copied[-1][1:3] == (None, None)
    holds, images = ([event[1] for event in told if event[0] == name] for name in ("hold", "image"))
    for (_, logits, image, thread), channels, raw in zip(copied[:-1], holds, images, strict=True):
        assert logits.flags.c_contiguous
        assert image.flags.c_contiguous
        assert is_same(logits, channels)
        assert is_same(image, raw)
        assert thread.startswith("read")


def test_an_interrupted_run_keeps_nothing(told: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_folders(tmp_path, "a", "b")

    def interrupted(self: CpuBackend, image: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(CpuBackend, "hold_image", interrupted)
    options = InferenceOptions(images=(folders.images,), logits=(folders.logits,), output=folders.output, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run_inference(options)
    assert any(event[:3] == ("copy", None, None) for event in told if event[0] == "copy" and event[1] is None)


@pytest.mark.parametrize(
    "error", [CapacityError("too little memory"), RuntimeError("no page-locked memory")], ids=["expected", "unexpected"]
)
def test_an_error_of_copying_ahead_is_none_of_the_run(error: Exception, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the case comes again when it is computed; an unexpected one is a warning."""
    folders = write_folders(tmp_path, "a", "b", "c")

    def refused(self: CpuBackend, logits: Any = None, image: Any = None) -> None:
        if logits is not None:
            raise error

    monkeypatch.setattr(CpuBackend, "copy_ahead", refused)
    options = InferenceOptions(images=(folders.images,), logits=(folders.logits,), output=folders.output, device="cpu")
    message = r"case '[abc]' could not be copied to the GPU ahead of time, and is copied when it is computed: RuntimeError\('no page-locked"
    expected = contextlib.nullcontext() if isinstance(error, CapacityError) else pytest.warns(RuntimeWarning, match=message)
    with expected:
        assert run_inference(options).count("done") == 3
