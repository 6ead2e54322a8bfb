"""How soon the page of `crfrefine tune` shows a change: `python benchmarks/sliders.py` prints the table of docs/guide/tuning.md.

Measured are the session's own answers, with counts and Dice, for the first case of BraTS 2015 in $CRFREFINE_DATA: seconds until the box is
shown, until something is shown of the whole case, and until that is final; behind the slash the processor time of all threads until then.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

from markdown_table import markdown_table

from crfrefine.apps.tune.session import Session, TuneOptions
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.infer.options import InferenceOptions

PRESETS = ("brats", "default", "keep-volumes")
SLIDERS = (
    "bilateral.weight",
    "bilateral.theta_alpha",
    "bilateral.theta_beta",
    "mean_field.num_iterations",
    "mean_field.temperature",
    "volume.weight",
)
HEADER = ["preset", "mask", "slider", "box", "something of the whole case", "all of it"]


def changed(parameters: CrfParameters, key: str, trial: int) -> object:
    """A value near the present one, another in each trial."""
    if key == "mean_field.num_iterations":
        return parameters.mean_field.num_iterations - 1 + 2 * (trial % 2)
    section, _, entry = key.partition(".")
    of = parameters.bilateral[0] if section == "bilateral" else getattr(parameters, section)
    return round(getattr(of, entry) * (1.0 + 0.02 * (trial + 1)), 6)


def answers(session: Session) -> Iterator[dict]:
    """The states of the page from now on until the newest request is answered."""
    version = 0
    while True:
        news = session.news(version, 120.0)
        version = news["version"]
        if news["error"]:
            raise SystemExit(str(news["error"]))
        yield news
        if not news["working"]:
            return


def measure(session: Session, key: str, trials: int) -> list[str]:
    """The least of several trials, each number by itself, as text."""
    assert list(answers(session))
    rows = []
    for trial in range(trials):
        parameters = CrfParameters.from_toml(session.describe()["toml"])
        started, used = time.perf_counter(), time.process_time()
        number = session.change({key: changed(parameters, key, trial)})["number"]
        seen: dict[str, tuple[float, float]] = {}
        for news in answers(session):
            result, now = news["result"], (time.perf_counter() - started, time.process_time() - used)
            if result and result["number"] == number:
                seen.setdefault("whole" if result["is_whole"] else "box", now)
        rows.append([*seen.get("box", seen["whole"]), *seen["whole"], *now])
    least = [min(column) for column in zip(*rows, strict=True)]
    return [f"{seconds:.2f} / {used:.2f}" for seconds, used in zip(least[::2], least[1::2], strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CRFREFINE_DATA", ".")) / "brats2015")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--masks", nargs="+", choices=("yes", "no"), default=("yes", "no"))
    parser.add_argument("--sliders", nargs="+", default=SLIDERS)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows = []
    for preset in options.presets:
        for mask in options.masks:
            inputs = InferenceOptions(
                (options.data / "images",),
                (options.data / "logits",),
                Path(),
                masks=options.data / "masks" if mask == "yes" else None,
                parameters=CrfParameters.load(preset),
                device="cpu",
                threads=options.threads,
                preview=True,
            )
            session = Session(TuneOptions(inputs, options.data / "labels"))
            try:
                for key in options.sliders:
                    if key == "volume.weight" and not inputs.parameters.volume.weight:
                        continue
                    found = measure(session, key, options.trials)
                    rows.append([preset, mask, key, *found])
                    print(*rows[-1], flush=True)
            finally:
                session.end()
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
