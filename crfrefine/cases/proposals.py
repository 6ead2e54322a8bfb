"""Patterns that fit the files of a folder, for messages: each was tried on the whole folder.

The names say what may be case and role (`layouts`), the voxels what each role holds. A pattern is
proposed if it takes the images of complete cases, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from pathlib import Path

from crfrefine.base.text import counted, listed
from crfrefine.cases.conventions import (
    LABEL_WORDS,
    MASK_WORDS,
    OTHER_WORDS,
    SCORE_WORDS,
    without_word,
)
from crfrefine.cases.layouts import (
    Names,
    Role,
    guess_layouts,
    have_common_endings,
    without_part,
    words_in,
)
from crfrefine.cases.pattern_advice import MAX_MODALITIES, nearest_files
from crfrefine.cases.patterns import Match, folder_of, in_listed_order
from crfrefine.cases.role_patterns import (
    globs_of_cases,
    words_between,
    write_patterns,
)
from crfrefine.cases.tree import IMAGE, LABEL_MAP, SERIES, Tree, describe_shape
from crfrefine.io.formats import LABELS_SUFFIXES
from crfrefine.io.paths import describe_others, is_folder, suffix_of

_NUM_SHOWN = 2  # proposals
_MAX_CASE_SETS = 6  # most sets of cases that are tried, the largest ones
_MIN_SHARE = 0.5  # of the files, of a proposal that leaves out label maps
_MAX_ROLES = 32  # With more, the names of cases are taken for roles.


@dataclass(frozen=True)
class Proposal:
    """A pattern of images and one of their label maps, with the files that they take."""

    images: str
    labels: str  # "" for none
    matches: tuple[Match, ...]
    label_matches: tuple[Match, ...]
    has_other_grids: bool  # whether the images of a case have several grids
    share: float  # of the files of the folder
    rank: tuple[float, ...]  # the greater, the better

    def is_likely(self, *, has_label_maps: bool) -> bool:
        """Return whether it takes all files of one case, or, of several, most or label maps."""
        if len({match.case for match in self.matches}) == 1:
            return self.share == 1
        return bool(self.labels) or not has_label_maps or self.share >= _MIN_SHARE

    def describe(self, tree: Tree) -> str:
        """Return the patterns, and what they take and leave out."""
        text = f"'{tree.folder}/{self.images}'"
        if self.labels:
            text += f", with label maps '{tree.folder}/{self.labels}'"
        takes = counted(len({match.case for match in self.matches}), "case")
        names = {match.modality for match in self.matches if match.modality}
        modalities = in_listed_order(Path(self.images), names)
        if modalities:
            takes += f" with the modalities {listed(modalities, MAX_MODALITIES)}"
        if self.has_other_grids:
            takes += ", on several grids (--resample)"
        if self.labels:
            takes += f", {counted(len(self.label_matches), 'label map')}"
        taken = {match.path for match in (*self.matches, *self.label_matches)}
        left_out = tree.paths - taken
        if left_out:
            first = min(left_out).relative_to(tree.folder)
            number = counted(len(tree.files), "file")
            takes += f"; left out are {len(left_out)} of {number}, as {first}"
        return f"{text} ({takes})"


def propose(folder: Path, *, holds_images: bool = True) -> str:
    """Return lines with patterns that fit the files of a folder, or with the shape of the folder.

    The result is "" if it holds no volumes. Several files of a case are its modalities, or, of a
    network's output, those of its labels.
    """
    tree = Tree(folder)
    if not tree.files:
        return ""
    proposals = find_proposals(tree)
    if not holds_images and not any(proposal.labels for proposal in proposals):
        proposals = _find_outputs(tree) or proposals
    if not proposals:
        return describe_shape(tree)
    return _describe(tree, proposals)


def propose_fewer_cases(folder: Path, images: Collection[Path]) -> str:
    """Return a line with a pattern if files that were taken for a case each are those of fewer.

    They are modalities, or label maps beside the images. The result is "" if names and voxels do
    not say so.
    """
    tree = Tree(folder)
    tree.files = [file for file in tree.files if folder / file.path in images]
    if not have_common_endings([file.stem for file in tree.files]):
        return ""
    for proposal in find_proposals(tree)[:1]:
        has_modalities = any(match.modality for match in proposal.matches)
        if proposal.share == 1 and (has_modalities or proposal.labels):
            return _describe(tree, [proposal])
    return ""


def _describe(tree: Tree, proposals: Sequence[Proposal]) -> str:
    lines = []
    for proposal, start in zip(proposals, ("Its files look like", "Or like"), strict=False):
        lines.append(f"\n  {start} {proposal.describe(tree)}")
    return "".join([*lines, ": give such a pattern in place of a folder."])


def advise(place: Path, *, holds_images: bool = True) -> str:
    """Return lines with the files that are there instead, and with patterns that fit them."""
    proposal = propose(folder_of(place), holds_images=holds_images)
    if not proposal and is_folder(place):
        proposal = describe_others(place)
    return nearest_files(place) + proposal


def images_among(
    matches: Sequence[Match], pattern: str, cases: Collection[str] = ()
) -> list[Match]:
    """Return the files that may be images by their names, of a pattern or a folder.

    `cases` are more names of cases. A plain `{modality}` would also take a label map beside the
    images for one, and a folder holds other files, too, as with -i FOLDER -p FOLDER; 3D Slicer
    saves CASE.seg.nrrd beside an image.
    """
    names = {*cases, *(match.case for match in matches)}
    words = OTHER_WORDS if "{modality}" in pattern else ()
    images = []
    for match in matches:
        owner = without_word(match.case, (*LABEL_WORDS, *MASK_WORDS, *SCORE_WORDS))
        is_other = owner != match.case and owner in names
        is_segmentation = suffix_of(match.path) in LABELS_SUFFIXES
        if not is_other and not is_segmentation and match.modality.lower() not in words:
            images.append(match)
    return images


def find_proposals(tree: Tree) -> list[Proposal]:
    """Return the best proposal for images with their label maps, and one that takes other files."""
    has_label_maps = False
    found: dict[str, Proposal] = {}  # by the pattern of the images
    by_rank = attrgetter("rank")
    for number, roles in enumerate(guess_layouts(tree.files, tree.kind_of)):
        most_cases = max((len(role.files) for role in roles), default=0)
        usual = [role for role in roles if 2 * len(role.files) >= most_cases]
        if len(usual) > _MAX_ROLES:
            continue
        by_kind: dict[str, list[Role]] = {}
        for role in usual:
            by_kind.setdefault(tree.kind_of_role(role), []).append(role)
        has_label_maps = has_label_maps or LABEL_MAP in by_kind
        proposals = [*_tried(tree, by_kind)]
        # Of a layout, images on one grid count more; among layouts, how many files they take.
        most = max((proposal.share for proposal in proposals), default=0.0)
        for proposal in proposals:
            rank = (*proposal.rank[:2], most, -number, *proposal.rank[2:])
            ranked = replace(proposal, rank=rank)
            known = found.get(proposal.images, ranked)
            found[proposal.images] = max(known, ranked, key=by_rank)
        if any(proposal.labels and proposal.share == 1 for proposal in proposals):
            break
    shown: list[Proposal] = []
    taken = set[Path]()
    for proposal in sorted(found.values(), key=by_rank, reverse=True):
        paths = {match.path for match in proposal.matches}
        has_labels = bool(proposal.labels) or not (shown and shown[0].labels)
        if proposal.is_likely(has_label_maps=has_label_maps) and has_labels and paths - taken:
            shown.append(proposal)
            taken = taken or paths
    return shown[:_NUM_SHOWN]


def _tried(tree: Tree, by_kind: Mapping[str, list[Role]]) -> Iterator[Proposal]:
    """Yield the proposals for roles that may be the modalities of complete cases."""
    images = by_kind.get(IMAGE, [])
    label_maps = by_kind.get(LABEL_MAP, [])
    if _are_numbered(images) and _are_numbered(label_maps):
        return  # Each time of an image has another label map, and is a case.
    case_sets = dict.fromkeys(frozenset(role.files) for role in images)
    largest = sorted(case_sets, key=len, reverse=True)
    for cases in largest[:_MAX_CASE_SETS]:
        complete = [role for role in images if cases <= role.files.keys()]
        labels = _choose_labels(cases, label_maps, complete[0])
        if len(cases) < 2:
            # A single case is told by the folder of its files, or by a name that has it twice.
            text = complete[0].text
            if text.split("/")[-2:-1] != ["{case}"] and text.count("{case}") < 2:
                continue
        for group in _parts_of(tree, complete, labels, min(cases)):
            if len(group) <= MAX_MODALITIES and not _have_own_labels(group, label_maps):
                yield from _try(tree, group, labels)
    if images:  # Files of several volumes beside them hold the times of the same.
        return
    for role in by_kind.get(SERIES, []):
        labels = _choose_labels(role.files.keys(), label_maps, role)
        # Without such, the volumes of a file may be times.
        if len(role.files) > 1 and labels is not None:
            yield from _try(tree, [role], labels)


def _are_numbered(roles: Sequence[Role]) -> bool:
    """Return whether two roles differ in a number, as frame01 and frame12."""
    names = {re.sub(r"\d{2,}", "#", role.text) for role in roles}
    return len(names) < len(roles)


def _have_own_labels(images: Sequence[Role], label_maps: Sequence[Role]) -> bool:
    """Return whether two roles have a label map each, of the same name: they are cases."""
    owners: dict[str, str] = {}  # the word of a role, by the name of label maps without it
    for word in words_between(images):
        for role in label_maps:
            rest = without_part(role.text, word, "{modality}")
            if rest != role.text and owners.setdefault(rest, word) != word:
                return True
    return False


def _parts_of(
    tree: Tree, roles: list[Role], labels: Role | None, case: str
) -> Iterator[list[Role]]:
    """Yield roles, those of them in each folder, those on the grid of labels, or each by itself."""
    yield roles
    by_folder: dict[Names, list[Role]] = {}
    for role in roles:
        by_folder.setdefault(role.names[:-1], []).append(role)
    if len(by_folder) > 1:
        yield from (group for group in by_folder.values() if len(group) > 1)
    if labels is not None and case in labels.files:
        on_grid = _on_grid(tree, roles, labels, case)
        if 1 < len(on_grid) < len(roles):
            yield on_grid
    if len(roles) > 1 and not words_between(roles):
        yield from ([role] for role in roles)


def _on_grid(tree: Tree, roles: Sequence[Role], labels: Role, case: str) -> list[Role]:
    """Return the roles whose file of a case has the grid of its label map."""
    reference = labels.files[case]
    return [role for role in roles if tree.are_on_one_grid([reference, role.files[case]])]


def _choose_labels(cases: Collection[str], roles: Sequence[Role], image: Role) -> Role | None:
    """Return the label maps of most of some cases: with the usual word, or near to the images."""
    candidates = []
    for role in roles:
        number = len(role.files.keys() & cases)
        words = words_in(role.last_name)
        if 2 * number < len(cases) or "brainmask" in words:
            continue
        order = (
            not words.isdisjoint(MASK_WORDS),
            words.isdisjoint(LABEL_WORDS),
            -number,
            role.names[:-1] != image.names[:-1],
            len(role.last_name),
            role.text,
        )
        candidates.append((order, role))
    if not candidates:
        return None
    _, chosen = min(candidates, key=itemgetter(0))
    return chosen


def _try(tree: Tree, images: list[Role], labels: Role | None) -> Iterator[Proposal]:
    """Yield the first pattern of some roles that takes their files, and no others, if any does."""
    cases = frozenset.intersection(*(frozenset(role.files) for role in images))
    label_pattern = ""
    label_matches: list[Match] = []
    if labels is not None:
        label_pattern, label_matches = _fitting(tree, [labels], "label", labels.files.keys())
    case = min(cases)
    files = [role.files[case] for role in images]
    has_other_grids = not tree.are_on_one_grid(files)
    is_on_grid_of_labels = not has_other_grids
    if len(images) > 1:
        in_order = sorted(zip(words_between(images), images, strict=False), key=itemgetter(0))
        images = [role for _, role in in_order] or images
    is_ordered = False
    if label_pattern and labels is not None and case in labels.files:
        # Others come onto the grid of the first.
        on_grid = _on_grid(tree, images, labels, case)
        if not on_grid:
            return
        is_on_grid_of_labels = len(on_grid) == len(images)
        if images[0] not in on_grid:
            is_ordered = True
            images = [*on_grid, *(role for role in images if role not in on_grid)]
    pattern, matches = _fitting(tree, images, "modality", cases, is_ordered=is_ordered)
    if not pattern:
        return
    num_with_digit = sum(any(letter.isdigit() for letter in case) for case in cases)
    share = (len(matches) + len(label_matches)) / len(tree.files)
    rank = (bool(label_pattern), 2 * num_with_digit >= len(cases), is_on_grid_of_labels, share)
    yield Proposal(
        pattern, label_pattern, tuple(matches), tuple(label_matches), has_other_grids, share, rank
    )


def _fitting(
    tree: Tree,
    roles: Sequence[Role],
    part: str,
    cases: Collection[str],
    *,
    is_ordered: bool = False,
) -> tuple[str, list[Match]]:
    """Return the first pattern that takes exactly the files of roles and cases; "" for none."""
    wanted = set[tuple[str, Path]]()
    for role in roles:
        wanted.update((case, tree.folder / role.files[case].path) for case in cases)
    near = []
    for pattern in write_patterns(roles, part, is_ordered=is_ordered):
        matches = tree.find(pattern)
        if part == "modality":
            matches = images_among(matches, pattern)
        found = {(match.case, match.path) for match in matches}
        if found == wanted:
            return pattern, matches
        if found > wanted:
            near.append((pattern, {case for case, _ in found - wanted}))
    for pattern, others in near:
        for globs in globs_of_cases(cases, others):
            narrow = pattern.replace("{case}", f"{{case:{globs}}}", 1)
            matches = tree.find(narrow)
            if {(match.case, match.path) for match in matches} == wanted:
                return narrow, matches
    return "", []


def _find_outputs(tree: Tree) -> list[Proposal]:
    """Return the best proposal for a network's output: a file per case, or one for each label."""
    found = []
    for number, roles in enumerate(guess_layouts(tree.files, tree.kind_of)):
        most = max((len(role.files) for role in roles), default=0)
        complete = [role for role in roles if 1 < len(role.files) == most]
        for group in (complete, *([role] for role in complete)):
            # Files of the labels of a case are of the same cases each.
            if len({frozenset(role.files) for role in group}) != 1:
                continue
            if len({tree.kind_of_role(role) for role in group}) > 1:
                continue
            pattern, matches = _fitting(tree, group, "label", group[0].files.keys())
            if pattern:
                share = len(matches) / len(tree.files)
                rank = (share, -number)
                found.append(Proposal(pattern, "", tuple(matches), (), False, share, rank))
    return sorted(found, key=attrgetter("rank"), reverse=True)[:1]
