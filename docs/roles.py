"""Write docs/reference/roles.md: what is taken for granted about the inputs, a table.

A guess that nothing in the files can contradict is not made. What is guessed is told by a note, or
by what `info` shows; what contradicts it is an error, or a note where results stay right. The
beginnings of errors are those of their messages, so that a test can compare them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.notes import NoteKind

PAGE = Path(__file__).parent / "reference" / "roles.md"


@dataclass(frozen=True)
class Guess:
    """A rule: what is assumed, why, what speaks against it, and how to say otherwise."""

    about: str  # the input or the property
    assumed: str
    evidence: str
    contradicted: str  # by what, and what follows then
    otherwise: str  # the option or the pattern that says otherwise
    notes: tuple[NoteKind, ...] = ()  # those that tell of it
    errors: tuple[str, ...] = ()  # a part of the message of each error that contradicts it


IMAGES_AND_LABELS = (
    Guess(
        "image",
        "a file that a folder or a pattern brings is an image, a modality of its case",
        "its place or its name, without a word such as `seg` or `mask` for `{modality}`",
        "few different values, or whole numbers in regions, as in a label map: an error",
        "naming the file, `-i FILE`, or its modality, `{modality:t1,seg}`",
        (NoteKind.NOT_IMAGES, NoteKind.FOLDER_PER_CASE),
        ("found a label map by its voxels",),
    ),
    Guess(
        "image that is named",
        "a file that looks like a label map is an image all the same",
        "`-i FILE`, a row of a manifest, or a modality that a pattern lists",
        "all voxels equal those of the reference or of the network's output, or the volumes of a "
        "file are probabilities or logits, as their sums or the label map show: errors",
        "nothing: such a CRF would refine with the answer",
        (NoteKind.NAMED_IMAGE,),
        ("all of its voxels are equal to those of", "found a network's output by its voxels"),
    ),
    Guess(
        "label map, reference, strokes",
        "a file in their place holds labels",
        "whole numbers from 0 to 65535, one per voxel",
        "many values that change from voxel to voxel, as those of an image or of a probability in "
        "percent, or fractions: an error",
        "`--input-type labels`; `--scale` for probabilities",
        (NoteKind.THIN_LAYERS, NoteKind.BYTES_SWAPPED),
        ("as those of an image", "not a label map: expected"),
    ),
    Guess(
        "mask",
        "the model applies where a mask is not 0",
        "a file of this kind is given",
        "many different values of which most neighbors differ, as in an image; no voxel: errors",
        '`--masks nonzero` or `intensity.mask = "nonzero"` for an image without its surroundings',
        (),
        ("found an image by its voxels", "the mask is empty on the image's grid"),
    ),
    Guess(
        "-i and -p",
        "the images are those of `-i`",
        "the option",
        "the cases are complete the other way round, or there is no image: an error",
        "exchanging them",
        (),
        ("-i and -p seem to be exchanged",),
    ),
    Guess(
        "a file in `convert` and `info`",
        "a label map, or an image",
        "at most 32 different whole numbers, or regions of them; segments with names",
        "no value changes either way; the first line says which",
        "`--as image`, `--as labels`",
    ),
    Guess(
        "volumes of a 4-D image",
        "they are modalities",
        "the header has no time, or a `dataset.json` has as many `channel_names`",
        "the header says that they follow each other in time: an error",
        "`convert --split`, or `channel_names`",
        (),
        ("follow each other in time",),
    ),
)

SCORES = (
    Guess(
        "several channels of a network",
        "probabilities, or logits",
        "all values in [0, 1] and sums of 1: probabilities; any value outside: logits",
        "in [0, 1] without sums of 1, or equal sums other than 1, as of percent: errors",
        "`--input-type logits` or `probabilities`, `--scale 100`",
        (NoteKind.TAKEN_AS, NoteKind.CLIPPED_PROBABILITIES),
        ("no value is negative, and the labels sum to",),
    ),
    Guess(
        "one value per voxel of a network",
        "a label map, or the probability of label 1",
        "whole numbers: labels; values in [0, 1], some not whole, up to .5 at least: probabilities",
        "other values: an error",
        "`--input-type labels`, `logits` or `probabilities`",
        (NoteKind.TAKEN_AS, NoteKind.CHANNEL_OF_PROBABILITIES, NoteKind.CHANNEL_OF_LOG_ODDS),
        ("neither a label map, of whole",),
    ),
    Guess(
        "channels of 0 and 1",
        "a label map, one-hot",
        "each voxel has 1 in one channel and 0 in the others",
        "files of their own that are all 0 at some voxels, as one file per structure: an error",
        "`--input-type`",
        (NoteKind.TAKEN_AS,),
        ("files of 0 and 1, all of them 0 at",),
    ),
    Guess(
        "channel 0",
        "the background; channel 7 is label 7",
        "the network's convention, and `labels` of a `dataset.json`",
        "another number of channels than `dataset.json` has labels; probabilities whose sum is not "
        "1, as without a background: errors",
        "`--add-background`, `--regions`, `--channel-labels`",
        (
            NoteKind.CHANNELS_WITHOUT_BACKGROUND,
            NoteKind.SUMS_ABOVE_ONE,
            NoteKind.SCALED_FOREGROUND,
        ),
        ("--add-background needs probabilities between 0 and 1",),
    ),
    Guess(
        "regions",
        "channels overlap, with a sigmoid each",
        "`regions_class_order` in a `dataset.json`, or `--regions`",
        "as many channels as labels with sums of 1: a softmax; any other number: an error",
        "`--regions`, another `dataset.json`",
        (NoteKind.TAKEN_AS, NoteKind.CHANNELS_OF_REGIONS),
        ("whether these are regions is not clear",),
    ),
    Guess(
        "voxels that the network did not see",
        "where all channels are equal, it is certainly background",
        "padding around a cropped output, or holes where no window looked",
        "most of the grid is such padding: an error",
        "exporting the network's output on the image's grid",
        (NoteKind.PADDING, NoteKind.HOLES),
        ("all labels have the same value at",),
    ),
    Guess(
        "a label map's network",
        "its grid is the image's",
        "no stairs of equal blocks",
        "blocks of several voxels: a note",
        "`--network-spacing`",
        (
            NoteKind.FOUND_NETWORK_SPACING,
            NoteKind.MAYBE_COARSER_NETWORK,
            NoteKind.NO_BLOCKS,
            NoteKind.GIVEN_NETWORK_SPACING,
        ),
    ),
)

FRAMES = (
    Guess(
        "an array without geometry, `.npz` or `.npy`",
        "(label, z, y, x) on the grid of the image, on the voxel axes of nnU-Net's reader, or else "
        "those of the image",
        "`plans.json` beside it names the reader; the label map of its name agrees with the argmax",
        "the label map agrees much better in other axes: an error; it hardly agrees, or is not "
        "there: a note",
        "`convert --like IMAGE --axes`",
        (NoteKind.FRAME_OF_PLANS, NoteKind.UNKNOWN_FRAME, NoteKind.DOUBTFUL_FRAME),
        ("its voxel axes seem to run toward",),
    ),
    Guess(
        "files on turned axes",
        "the same voxels, whose axes are turned without interpolation",
        "both headers",
        "voxels at other places: an error",
        "`--resample`",
        (NoteKind.TURNED, NoteKind.TURNED_CASES, NoteKind.RESAMPLED, NoteKind.OUTSIDE_GRID),
        ("are on different grids",),
    ),
    Guess(
        "label maps, masks and strokes on a smaller grid",
        "they are stored for a part of the image's grid, and 0 elsewhere",
        "their voxels are at those of the image",
        "voxels at other places: an error; voxels outside the image: a note",
        "`--resample`",
        (NoteKind.PART_OF_GRID, NoteKind.FILLED_CASES, NoteKind.CUT_OFF),
        ("are on different grids",),
    ),
    Guess(
        "units of length",
        "mm",
        "the header names no unit, or one that is not known",
        "a known unit is converted",
        "mending the header; `spacing` of a manifest",
        (NoteKind.UNKNOWN_UNITS, NoteKind.GIVEN_SPACING),
    ),
    Guess(
        "orientation",
        "voxels as nibabel places them",
        "the header has no orientation, or two that differ, or is of Analyze",
        "files of one case with other geometries: an error",
        "`convert --like IMAGE --same-voxels`",
        (
            NoteKind.NO_ORIENTATION,
            NoteKind.NO_MGH_ORIENTATION,
            NoteKind.ANALYZE,
            NoteKind.TWO_GEOMETRIES,
            NoteKind.SAME_VOXELS,
        ),
        ("are on different grids",),
    ),
    Guess(
        "a single slice of DICOM",
        "1 mm thick",
        "it has no thickness",
        "`SliceThickness` is there",
        "`convert --like`",
        (NoteKind.NO_THICKNESS,),
    ),
)

NAMES = (
    Guess(
        "cases",
        "files with one name, apart from known endings, belong together",
        "[the table of names](../guide/patterns.md#names-that-need-no-pattern)",
        "two files for one place, none, images and label maps that no word tells apart, and, in "
        "`info`, label maps by their voxels among the images: errors",
        "a pattern with `{case}`, or a manifest",
        (NoteKind.WITHOUT_IMAGES, NoteKind.NOT_REFERENCES, NoteKind.NOT_MEASURED),
        ("images and label maps cannot be told apart by name", "not each file is an image: "),
    ),
    Guess(
        "modalities",
        "each case has those that most cases have, in the order of their numbers or names",
        "`_0000`, `_0001` …, `channel_names` of a `dataset.json`, or `{modality}`",
        "a case that lacks one: an error",
        "`{modality:t1,t2}`",
        (NoteKind.NUMBERED_FILES,),
        ("expected the modalities",),
    ),
    Guess(
        "values per modality",
        "those of a parameter file are in the order of the images",
        "`modalities` in the file, where `train-crf` knew the names",
        "a run that has one of the names at another place, or files that are called so: an error",
        "`{modality:t1,t2}`",
        (NoteKind.ORDER_OF_MODALITIES,),
        ("in the order of the parameters",),
    ),
    Guess(
        "one file per structure",
        "binary files in a folder of the case, or with its name, are its structures",
        "`--input-type labels`; in `evaluate`, folders of such files on both sides",
        "values other than 0 and 1: an error",
        "`--no-structures` of `evaluate`",
        (
            NoteKind.STRUCTURES,
            NoteKind.COMPARED_STRUCTURES,
            NoteKind.SHARED_BY_STRUCTURES,
            NoteKind.BINARY_FILES,
        ),
        ("expected 0 and 1, found values up to",),
    ),
    Guess(
        "numbers of labels",
        "labels are matched by name where both sides have names; else a number means the same "
        "structure in all files",
        "names in the files and in `dataset.json`",
        "names that contradict, and labels that are not declared: errors; labels that hardly ever "
        "meet: a note",
        "`--map OLD=NEW`",
        (
            NoteKind.MATCHED_BY_NAME,
            NoteKind.OTHER_NUMBERS,
            NoteKind.OTHER_NUMBERS_WITH_MAP,
            NoteKind.OTHER_LABELS,
        ),
        ("has labels that are not declared",),
    ),
    Guess(
        "a folder of nnU-Net",
        "its layout: predictions with `.npz`, or a trained network with folds",
        "`plans.json`, `dataset.json`, folders `fold_0`",
        "cases that no fold has validated: left out, with a note",
        "`-i` and `-p` in place of `--nnunet`",
        (NoteKind.FOLD_ALL, NoteKind.LEFT_OUT),
    ),
    Guess(
        "intensities",
        "`intensity.window` fits the image",
        "the parameters",
        "nearly all values lie outside of it: a note",
        "`intensity.normalization`",
        (NoteKind.WINDOW_DOES_NOT_FIT,),
    ),
    Guess(
        "the lowest intensity",
        "the outside of a field of view, which no percentile counts",
        "many voxels have it, and the next one is far away",
        "intensities in between: it counts",
        "a mask, or `intensity.window`",
        (NoteKind.FILL_LEFT_OUT,),
    ),
    Guess(
        "NaN in an image",
        "voxels that take no part",
        "programs mark the outside of a brain or of the field of view so",
        "all voxels are NaN: an error; NaN in logits: an error",
        "replacing them",
        (NoteKind.NAN_VOXELS,),
        (" are NaN",),
    ),
)

GUESSES = {
    "Images and label maps": IMAGES_AND_LABELS,
    "Logits, probabilities and labels": SCORES,
    "Grids": FRAMES,
    "Names": NAMES,
}

HEAD = """# Roles: what every input is taken for

Options and names say a part of the role of a file: an image or a label map, and the meaning of its
numbers. The rest is guessed. **A role is checked by content**: the voxels that are read anyway, the
headers and the files beside them either agree with it or contradict it. A contradiction is an error
of that case, which names the file, what was expected and found, the evidence, and what says
otherwise. What is guessed is told: by a note of the run, and by [`info`](cli.md#info), which shows
the role of each file with its evidence. A guess that nothing could contradict is not made.

Each table has all guesses of one kind. They stand in `docs/roles.py`, which writes this page, and a
test compares them with the notes and errors of the program.

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
