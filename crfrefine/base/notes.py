"""Notes: what a command or `refine` has assumed, ignored or found, as data and as a sentence.

A note is a kind with its values. Programs and other rooms read these; the sentence of each kind is
written here once, and nothing but people reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, unique
from string import Formatter
from typing import Any, Self

from crfrefine.base.text import MAX_LISTED, counted, listed, shorten_value


@unique
class NoteKind(Enum):
    """The kinds of notes, each with its sentence.

    A kind is called with the values of a note, which its sentence has in braces. Besides
    Python's formats there are `{files:# file}`, such as "1 file" or "2 files", `{files:is/are}`, a
    word for one and another for several, and for a list the most entries that are named,
    `{names:3}`. `{what}` is what tells notes of a kind apart.
    """

    OTHER = "{text}"  # of a record that another version has written

    # ---- Headers of files (`io`)
    OTHER_FORMAT = "the file is {format}, although its name does not say so; it is read as such"
    COMPRESSED = "the file is compressed, although its name says otherwise"
    NOT_COMPRESSED = "the file is not compressed, although its name says otherwise"
    BEHIND_VOXELS = (
        "{surplus:# byte} behind its voxels {surplus:is/are} ignored, as in ITK and nibabel; are "
        "the sizes and the type of voxels in its header right?"
    )
    READ_BY_ITK = "read through SimpleITK: its header has {reason}"
    UNKNOWN_UNITS = "its {field} are {units}, which are not known; mm is assumed"
    NO_ORIENTATION = "no orientation in the header (sform and qform codes are 0)"
    NO_MGH_ORIENTATION = (
        "no orientation in the header; coronal slices of 1 mm are assumed, as in nibabel"
    )
    ANALYZE = "Analyze 7.5 does not say which side is left: its axes are taken as nibabel does"
    TWO_GEOMETRIES = (
        "sform and qform differ by up to {distance:.2f} mm; the sform is used, and both are kept "
        "in output files"
    )
    TURNED = "voxel axes turned from {before} to {after}, without interpolation"
    DICOM_LEFT_OUT = "left out: {files:# file} ({what}), such as {first}"
    NO_THICKNESS = "a single slice without thickness; 1 mm is assumed"
    FRACTIONS = "its segments are fractions ({what}); voxels of at least half are taken"
    ONLY_SLICES_OF_SEGMENTS = (
        "it holds only the slices that its segments reach; "
        "--like SERIES gives it the grid of its series"
    )
    SEGMENTS_BY_NAME = (
        "segments are described by the names of their labels, whose numbers are others"
    )

    # ---- Values of arrays and files (`arrays`)
    TAKEN_AS = "{name} is taken as {what}: {reason}"
    CHANNEL_OF_LOG_ODDS = "one channel, taken as the log-odds of label 1 (logits of background: 0)"
    CHANNEL_OF_PROBABILITIES = (
        "one channel, taken as the probability of label 1 (background: 1 minus it)"
    )
    CHANNELS_WITHOUT_BACKGROUND = (
        "{channels} channels, taken as the probabilities of labels 1 to {channels}; background is "
        "1 minus their sum (--add-background)"
    )
    SUMS_ABOVE_ONE = (
        "probabilities of the given labels that sum to more than 1, up to {highest:.6g}, are "
        "divided by their sum, and background is 0 there: {voxels:# voxel}"
    )
    SCALED_FOREGROUND = (
        "whole numbers whose sums over the given labels reach {highest:g} and no more are taken as "
        "probabilities from 0 to {top:g}; --scale N says another scale"
    )
    BYTES_SWAPPED = (
        "all labels are multiples of 256, up to {largest}, as where a program has read 16 bits in "
        "the other order of bytes; if so, save the file anew, or give them their numbers with --map"
    )
    FILL_LEFT_OUT = (
        "the lowest intensity of modality {modality}, {fill:g} at {share:.1%} of the voxels, is "
        "taken for the outside of the field of view, as the next one is {next:g}: percentiles are "
        "those of the others"
    )
    PADDING = (
        "voxels whose {what}, such as padding around a cropped output, are excluded and become "
        "background: {padding} of {voxels} voxels ({share:.1%})"
    )
    HOLES = (
        "voxels inside the field of view whose {what}, as where no sliding window of the network "
        "looked, are excluded and become background, also inside structures: {inside} of {voxels} "
        "voxels ({share:.1%}) in {holes:# hole}; if windows are missing, run the network again "
        "with windows that overlap"
    )
    CLIPPED_PROBABILITIES = "probabilities: {problem}"
    THIN_LAYERS = (
        "{layers} of {labels} labels lie only in thin layers between two others, as where the "
        "border of a mask from 0 to 255 was smoothed or interpolated: cut such a mask at half of "
        "its range, or resample label maps with nearest neighbor"
    )
    NAN_VOXELS = (
        "{nan} of {voxels} voxels ({share:.1%}) of the image are NaN and take no part, as if "
        "outside the mask"
    )
    WINDOW_DOES_NOT_FIT = (
        "intensity.window does not seem to fit modality {modality}: it is [{low:g}, {high:g}], and "
        "the image has values from {lowest:g} to {highest:g}: {problem}. For images other than CT, "
        "intensity.normalization = percentile is usual"
    )
    GIVEN_NETWORK_SPACING = (
        "the label map is taken as that of a coarser network: {sizes} voxels of the image"
    )
    FOUND_NETWORK_SPACING = (
        "the label map is taken as that of a coarser network, found in it: blocks of {sizes} "
        "voxels: {spacing} mm"
    )
    MAYBE_COARSER_NETWORK = (
        "the label map looks like that of a coarser network, whose stairs stay; for a border at "
        "the image's resolution add --network-spacing auto, in Python network_spacing='auto': "
        "blocks of {sizes} voxels: {spacing} mm"
    )
    SINGLE_LABEL = "the label map has a single label: there are no borders to refine"
    NO_BLOCKS = (
        "the label map has no blocks of a coarser grid, as maps have that nearest neighbor brought "
        "to the image's grid: taken as one of the image's own voxels, {spacing} mm; if the network "
        "was coarser, give its spacing: --network-spacing MM, in Python network_spacing=..."
    )
    VALUES_NOT_FOUND = "--map: {what} has the value {numbers}"
    REMOVED_BY_RULES = (
        "structures that rules of [postprocess] removed, in whole or by more than {share:.0%}, by "
        "{rule}: {structures:50}"
    )

    # ---- The files of cases (`cases`)
    ORDER_OF_MODALITIES = (
        "the parameters have a value for each modality and do not name these: they are taken in "
        "the order of the alphabet, {names}; a list in the pattern, {{modality:…}}, says another "
        "order, and `modalities` in the parameter file says what its values are for"
    )
    NAMED_IMAGE = "looks like a label map ({reason}), and is taken as an image, since it is named"
    FOLDER_PER_CASE = (
        "a folder for each case, as in TotalSegmentator's data sets, with its image, such as "
        "{first}"
    )
    NOT_IMAGES = "not taken for images: {files:# file} beside them, such as {first}"
    STROKES_OF_SOME = "strokes of {drawn} of {cases:# case}; the others are refined without"
    WITHOUT_IMAGES = "ignored {files:# file} of {what} without images, such as {first}"
    NOT_UTF8 = "is not UTF-8; read as Windows-1252 (Latin-1)"
    BAD_DESCRIPTION = "{problem}; continuing without it"
    LEFT_OUT = "{left_out} of {cases:# case} {left_out:is/are} left out: {reasons}"
    FOLD_LACKS = "{advice}"
    FOLD_ALL = "fold_all was trained on all cases and is not used"
    IMAGES_OF_RAW_DATA = "the images are those of nnU-Net's raw data, {images}"
    VALIDATED_WITHOUT_IMAGE = (
        "validated cases without an image in {images} are ignored ({cases}), such as {first}"
    )
    GIVEN_SPACING = "spacing {given} mm as given, in place of {stored} mm"
    RESAMPLED = "{what} {how} from {source} onto the grid of the {grid}"
    OUTSIDE_GRID = (
        "voxels outside the grid of the {what} {outside}: {left_out} of {voxels} voxels "
        "({share:.1%})"
    )
    PART_OF_GRID = (
        "the {what} {verb} stored for a part of the grid of the {grid}, {box}; the others {outside}"
    )
    CUT_OFF = (
        "{left_out} of {voxels} voxels of the {what} that are not 0 lie outside the {grid}, and "
        "are left out"
    )
    FRAME_OF_PLANS = "its voxel axes run toward {axes}, by the reader {reader} that {plans} names"
    UNKNOWN_FRAME = (
        "an array without geometry, taken on the voxel axes of the image ({axes}); nothing beside "
        "it says otherwise"
    )
    DOUBTFUL_FRAME = (
        "an array without geometry, taken on the voxel axes of the image ({axes}); its labels "
        "agree with the label map {label_map} at {share:.0%} of the voxels, and no better in other "
        "axes"
    )
    MATCHED_BY_NAME = "labels are matched by name with {sources:3}: {labels:8}"
    MATCHED_BY_NAME_IN = "{what}: {files:# file} with other numbers, such as {first}"
    STRUCTURES = "{name} is taken as one file per structure: {files:# file}, {not_empty} not empty"
    SHARED_BY_STRUCTURES = (
        "structures overlap, and the smaller one keeps the voxel: {voxels} voxels"
    )
    LOSING_STRUCTURES = (
        "structures that lose most of their voxels to smaller ones: {structures:12}; if it is a "
        "union of others, leave its file out and unite its refined parts"
    )

    # ---- Refinement
    ON_CPU_FOR_MEMORY = (
        "computed on the CPU, since the case does not fit into the memory of {device}: {problem}"
    )
    NARROW_KERNELS = (
        "kernels are narrower than the voxels, so neighbors hardly count: the widest bandwidth is "
        "{width:.2g} voxels; --set {key}={usual:.3g} ({unit}) makes it {usual_width:g}"
    )
    MISSED_VOLUMES = (
        "volume.match_input misses volumes of the label map, since its bias has a limit; smaller "
        "weights or a larger mean_field.temperature let it reach them: {volumes:20}"
    )
    DRAWN_STROKES = "strokes: {drawn}"
    RULED_OUT_STROKES = (
        "strokes: the network rules out label {labels} by more than {nats:g} nats at "
        "{voxels:# drawn voxel}; voxels around hardly follow: draw all of the error there, or "
        "raise mean_field.temperature"
    )

    # ---- Runs of `infer`
    PRESET_SHARP = (
        "parameters are those of the preset sharp, since --network-spacing is given without -c"
    )
    NO_WEIGHT = (
        "all weights of the parameters are 0, so there is no CRF: only mean_field.bias and "
        "[postprocess] can change labels"
    )
    FOLDER_OF_STRUCTURES = "--save-structures: one file per label goes into the folder {folder}"
    FASTER_ON_CPU = (
        "computed on the CPU, which is expected to take {seconds:.1f} s, less than the start of "
        "the GPU; --device cuda takes the GPU"
    )
    NEW_FOLDER = "--summary: the folder {folder} is made, as there was none"
    NOTHING_TO_COPY = (
        "nnUNetv2_ensemble also needs {names} beside the probabilities, which is not there to be "
        "copied"
    )
    WITHOUT_STATISTICS = "{cases:# case} ({names}): done without --statistics; refined again"
    HELD_OUT = (
        "{cases:# case}: each with the parameters of the fold of train-crf that held it out, by "
        "the report beside them"
    )
    LEARNED_ON = (
        "{learned} of {cases:# case} {learned:is/are} among those that the parameters were learned "
        "on, and so no evidence for new cases"
    )
    OTHER_INPUTS = "refined from other {inputs}: refined again"
    NO_STROKES = "strokes: no voxel is drawn"
    VANISHED = "labels that vanished: {labels:50}"
    VANISHED_BY_CRF = (
        "labels that vanished: {labels:50}; a lower bilateral.weight or mean_field.temperature "
        "changes less"
    )
    NO_CHANGE = "no voxel changed its label"
    NO_CHANGE_BY_CRF = (
        "no voxel changed its label; a larger bilateral.weight, bilateral.theta_alpha or "
        "mean_field.temperature changes more"
    )
    STALE_REMOVED = "files of an earlier result are removed: {names}"
    STALE_LEFT = "files that this run has not written are left as they are: {names}"
    GPU_LOST = (
        "the GPU stopped working: the other cases are computed on the CPU, as --device auto allows"
    )
    DISK_FULL = (
        "{cases:# case} not begun, since nothing more can be written; run again with --continue "
        "when it can"
    )
    NUMBERS_OF_LABELS = (
        "cases have different numbers of labels, as results of different networks have: {groups}"
    )
    LABELS_VANISHED_IN = "labels vanished in {cases:# case}: {names}"

    # ---- The states of cases by the records of earlier runs
    UNREADABLE_RECORD = "cannot be read: {problem}"
    UNUSABLE_LINES = "{lines:# line} of the record cannot be used: {first}"
    FAILED = "{problem}"
    NOT_REACHED = "not reached"
    GONE = "{path} is gone"
    NO_RECORD = "no record of its label map, as after a kill"
    CHANGED = "its label map was changed since it was recorded"
    FROM_OTHER_INPUTS = "refined from other inputs"
    BY_OTHER_VERSION = "refined by another version of crfrefine"
    WITH_OTHER_VALUES = "refined with other values of {keys}"
    WITH_OTHER_STROKES = "refined with other strokes"
    EARLIER_RESULTS = "{cases:# case} ({names}): {what}; {consequence}"

    # ---- `evaluate`
    NOT_REFERENCES = "not taken for references: {files:# file} beside label maps, such as {first}"
    NOT_MEASURED = "not measured: {cases:# case} without a reference, such as {first}"
    MISSING_FILES = "{what} for {lacking} of {cases} cases, such as {first}; {consequence}"
    COMPARED_STRUCTURES = (
        "{structures:# structure} in {cases:# case}: one binary file per structure, numbered in "
        "the order of names; --no-structures takes each file for a case"
    )
    CASES_OR_STRUCTURES = (
        "its files are binary and on one grid, as are structures of one case, but also cases in a "
        "common space, and names do not tell; --structures says that they are one case, "
        "--no-structures that each is one"
    )
    CASES_OF_STRUCTURES = (
        "its files are binary, and have names of several structures of {cases} cases, such as "
        "{first}; {advice}, or --no-structures takes each file for a case"
    )
    CASES_IN_STRUCTURES = (
        "its folders have names of structures and their files those of cases, such as {first}, but "
        "each folder would be a case; '{pattern}' in place of the folder says so, and likewise for "
        "the others, or --structures says that folders are cases"
    )
    BAD_REGIONS = "{problem}; continuing without its regions"
    MEASURED_ON_LEARNED = "{learned}; means and charts leave them out, if there are others"
    MAYBE_LEARNED = "{problem}; its parameters may have been learned on more cases than are known"
    NUMBERS_DIFFER_BY_FILE = (
        "names of labels have other numbers from file to file, and predictions have no names, so "
        "that numbers are compared: {labels:8}; a dataset.json beside predictions names labels"
    )
    NUMBERS_DIFFER_BY_PREDICTION = (
        "names of labels of {what} have other numbers from file to file, and references have no "
        "names, so that numbers are compared: {labels:8}; a dataset.json beside the references "
        "names labels"
    )
    NUMBERS_OF_FIRST = (
        "{what} has no names of labels, and references give them other numbers from file to file: "
        "its numbers are taken for those of {sources:2}; a dataset.json beside its files names them"
    )
    EQUALS_REFERENCE = (
        "{what} equals the reference at every voxel of {cases:# case}: is it a copy of it?"
    )
    OTHER_NAMES = (
        "{what} hardly ever finds labels of the reference where labels with other names are: "
        "{labels:8}; if these are the same structures, give them the same names"
    )
    OTHER_NUMBERS = (
        "{what} seems to have other numbers than the reference, whose labels it hardly ever finds: "
        "{labels:8}"
    )
    OTHER_NUMBERS_WITH_MAP = (
        "{what} seems to have other numbers than the reference, whose labels it hardly ever finds: "
        "{labels:8}; if these are the same structures, add {options}"
    )
    LOSING_STRUCTURES_OF_UNION = (
        "structures that lose most of their voxels to smaller ones: {structures:12}; to measure a "
        "union of others, leave its file out and give its parts with --regions"
    )
    NOWHERE_HALF = (
        "taken as the probability of label 1, which is below 0.5 everywhere, so that no voxel has "
        "the label; a mask is written as 0 and 1"
    )
    NO_CALIBRATION = "no calibration: {problem}"
    EARLIER_REPORT = "{path} is from an earlier run"
    NO_CHARTS = "the report has no charts: {problem}"
    SHOWN_WITHOUT = "case {case!r}: shown without {missing}: {problem}"

    # ---- `tune`
    STROKES_DRAWN_OVER = (
        "its strokes are drawn over those of the corrections, which are there already; Undo takes "
        "them back"
    )
    STROKES_FROM_ELSEWHERE = (
        "was changed elsewhere, and its strokes are shown; Undo takes back what differs from those "
        "drawn here"
    )

    # ---- `train-crf`
    CHANNELS_OF_REGIONS = "the logits have one channel per region of {source}: {regions}"
    TURNED_CASES = (
        "other voxel axes than those of the image are turned, without interpolation: cases {cases}"
    )
    FRAME_CASES = (
        "arrays without geometry are taken on the voxel axes of the image, and nothing beside them "
        "says otherwise: cases {cases}"
    )
    FILLED_CASES = (
        "files that are stored for a part of the image's grid are background elsewhere: "
        "cases {cases}"
    )
    OTHER_LABELS = (
        "no reference has the labels {predicted} of the label maps, and no label map {missed} of "
        "the references; if these are the same structures, add --map {option}"
    )
    TRAINED_ON_CORES = (
        "training on the CPU, whose {cores} cores are expected to be faster than the GPU for crops "
        "of this size; --device cuda takes the GPU"
    )
    TRAINED_WITHOUT_GPU = "training on the CPU: {problem}"
    LOW_DICE = (
        "the network agrees with the reference to a mean Dice of {dice:.3f}: are the logits' "
        "channels in the order of the labels or regions, do label maps have the numbers of the "
        "reference (else --map), and do logits and labels belong together?"
    )
    NOT_READ = "{path} is not read: --unlabeled chooses without labels"
    CHOSEN_EARLIER = "parameters as an earlier run into this folder has chosen them: {name}"
    NOT_USED = "{cases:# case} not used:\n  {reasons}"

    # ---- `convert` and `info`
    SAME_VOXELS = (
        "its voxels are taken for those of {image}, whatever its header says (--same-voxels)"
    )
    PLACED_ARRAY = "{grid}, with {common} {image}"
    NUMBERED_FILES = (
        "{first} and {others:# other file} are taken for modalities of one case, by their numbers; "
        "if each file is a case, give {pattern}"
    )
    FEWER_CASES = "each file is taken for a case, but may be a modality of fewer{proposal}"
    BINARY_FILES = (
        "one binary file per structure; refine them with -p {folder}{images} and --input-type "
        "labels"
    )
    NO_LOGITS = "no case has logits: there is no folder {folder}, which train-crf needs"
    WITHOUT_IMAGES_OF_NNUNET = "files are described without their images: {problem}"

    def __call__(self, file: str = "", /, **values: Any) -> Note:
        """Return a note on a file, or on none, with values of JSON: texts, numbers and lists.

        Numbers of numpy become those of Python.
        """
        for name, value in values.items():
            if hasattr(value, "item"):
                values[name] = value.item()
        return Note(self, values, file)


@dataclass(frozen=True)
class Note:
    """A note: its kind and what its sentence is about. `str` returns the sentence."""

    kind: NoteKind
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)  # by the names in it
    file: str = ""  # the file or folder that it is about, which the sentence begins with
    part: str = ""  # in `evaluate` the method, or "reference"; before the file

    def __str__(self) -> str:
        sentence = _SENTENCES.vformat(self.kind.value, (), self.values)
        return ": ".join(text for text in (self.part, self.file, sentence) if text)

    def about(self, file: str) -> Self:
        """Return the note on a file."""
        return replace(self, file=file)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON has of a note."""
        return {
            "kind": self.kind.name.lower(),
            "text": str(self),
            "part": self.part,
            "file": self.file,
            "values": dict(self.values),
        }

    @staticmethod
    def from_dict(entry: Mapping[str, Any] | str) -> Note:
        """Return the note of a record; older records have only its sentence.

        A note of another version keeps its sentence where this version lacks its kind, or has other
        values in the sentence. Raise KeyError, TypeError or ValueError for an entry that is none.
        """
        if isinstance(entry, str):
            return NoteKind.OTHER(text=entry)
        kind = NoteKind.__members__.get(str(entry["kind"]).upper())
        text = entry["text"]
        if not isinstance(text, str):
            raise TypeError(f"text: expected the sentence of a note, got {shorten_value(text)}")
        of_sentence = NoteKind.OTHER(text=text)
        if kind is None:
            return of_sentence
        note = Note(kind, entry["values"], str(entry["file"]), str(entry["part"]))
        try:
            str(note)
        except (LookupError, TypeError, ValueError, AttributeError):
            return of_sentence
        return note


class _Sentences(Formatter):
    """Python's formats, and those of `NoteKind`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, (list, tuple)):
            return listed(value, int(format_spec or MAX_LISTED))
        if format_spec.startswith("# "):
            return counted(value, format_spec[2:])
        if "/" in format_spec:
            return format_spec.split("/")[value != 1]
        return str(super().format_field(value, format_spec))


_SENTENCES = _Sentences()


Notes = tuple[Note, ...]
