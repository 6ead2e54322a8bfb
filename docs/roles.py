"""Write docs/reference/roles.md, the page of every guess, from the table of the program."""

from pathlib import Path

from crfrefine.cases.guesses import GUESSES, Guess

PAGE = Path(__file__).parent / "reference" / "roles.md"
HEAD = """# Roles: what every input is taken for

Options and names say a part of the role of a file: an image or a label map, and the meaning of its
numbers. The rest is guessed. **A role is checked by content**: the voxels that are read anyway, the
headers and the files beside them either agree with it or contradict it. A contradiction is an error
of that case, which names the file, what was expected and found, the evidence, and what says
otherwise. What is guessed is told: by a note of the run, and by [`info`](cli.md#info), which shows
the role of each file with its evidence. A guess that nothing could contradict is not made.

Each table has all guesses of one kind. They are written by `docs/roles.py` from
`crfrefine/cases/guesses.py`, and a test compares them with the notes and errors of the program.

"""
COLUMNS = ("about", "assumed", "because of", "contradicted by", "who says otherwise")


def row(guess: Guess) -> str:
    """Return the row of a guess."""
    cells = (
        f"**{guess.about}**",
        guess.assumed,
        guess.evidence,
        guess.contradicted,
        guess.otherwise,
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the text of the page."""
    text = HEAD
    for title, guesses in GUESSES.items():
        rows = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- | --- |"]
        rows += [row(guess) for guess in guesses]
        text += f"## {title}\n\n" + "\n".join(rows) + "\n\n"
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
