"""Checks of options and regions before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from crfrefine.base.text import listed, shorten
from crfrefine.errors import ConfigError, InputError
from crfrefine.metrics.regions import RESERVED, Region, parse_region
from crfrefine.train.dataset import LabeledCases
from crfrefine.train.device import TrainingDevice, choose_device
from crfrefine.train.options import LEARNABLE, LOSSES, RULES_GROUP, VOLUME_GROUP, TrainingOptions


def check_options(options: TrainingOptions) -> TrainingDevice:
    """Return the device; raise ConfigError or InputError for invalid options, before anything is read."""
    from crfrefine.io.atomic import check_replaceable, check_small_output, check_writable

    known = (*LEARNABLE, VOLUME_GROUP, RULES_GROUP)
    unknown = [name for name in options.learn if name not in known]
    if unknown or not options.learn:
        given = listed(options.learn) or "nothing"
        raise ConfigError(f"--learn: expected some of {', '.join(known)}, separated by commas; got {given}")
    if not any(name in (*LEARNABLE, VOLUME_GROUP) for name in options.learn):
        raise ConfigError(f"--learn: {RULES_GROUP} goes with a CRF that is learned; add some of {', '.join(LEARNABLE)}")
    if options.loss not in LOSSES:
        raise ConfigError(f"--loss: expected one of {', '.join(LOSSES)}; got {options.loss}")
    if options.num_optimizer_steps is not None and options.num_optimizer_steps < 1:
        raise ConfigError(f"--num-iterations: expected at least 1, got {options.num_optimizer_steps}")
    if options.parameters is not None and options.parameters.postprocess.decision != "argmax":
        raise ConfigError(
            f"--config: postprocess.decision = '{options.parameters.postprocess.decision}' cannot be trained with: training and verdict "
            "are on the argmax of the CRF's marginals; set it to 'argmax', and to another value in the file that train-crf writes"
        )
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise ConfigError(f"--max-minutes: expected a positive number, got {options.max_minutes:g}")
    if options.max_minutes is not None and options.placement.is_cluster:
        raise ConfigError("--max-minutes: folds that are trained at the same time share no time; leave it out, or --workers and --dask")
    if options.output.suffix != ".toml" or options.output.is_dir():
        raise InputError(f"{options.output}: name a file for the parameters, ending in .toml")
    if options.config is not None and options.config.exists() and options.output.exists() and options.config.samefile(options.output):
        raise InputError(f"{options.output}: is the file of --config, which is not written over; choose another name")
    check_writable(options.output.parent)
    for path in (options.curves, options.report, options.output):
        check_small_output(path)
    check_replaceable(options.checkpoint)
    return choose_device(options.device)


def choose_regions(texts: Sequence[str], cases: LabeledCases) -> tuple[Region, ...]:
    """Return the requested regions, or those of the channels, or each foreground label.

    Raises:
        ConfigError: a region is malformed, is given twice, or has labels that the logits do not have.
    """
    if not texts:
        return _default_regions(cases)
    regions = tuple(parse_region(text) for text in texts)
    for region in regions:
        if max(region.labels) >= cases.num_labels:
            raise ConfigError(
                f"--regions {shorten(region.name)}: label {max(region.labels)} is not among the logits' 0 to {cases.num_labels - 1}"
            )
    twice = [name for name, count in Counter(region.name for region in regions).items() if count > 1]
    if twice:
        raise ConfigError(f"--regions: {twice[0]} is there twice")
    return regions


def _default_regions(cases: LabeledCases) -> tuple[Region, ...]:
    """Return the regions of the channels, or each foreground label by its name if usable, except the one without a reference."""
    if cases.regions is not None:
        names = [f"region {name}" if name == RESERVED else name for name in cases.regions.names]
        return tuple(Region(name, labels) for name, labels in zip(names, cases.regions.labels, strict=True))
    labels = [label for label in range(1, cases.num_labels) if label != cases.ignore_label]
    counts = Counter(cases.label_names[label] for label in labels)
    names = [cases.label_names[label] for label in labels]
    names = [f"label {label}" if name == RESERVED or counts[name] > 1 else name for label, name in zip(labels, names, strict=True)]
    if len(set(names)) < len(names):
        names = [f"label {label}" for label in labels]
    return tuple(Region(name, (label,)) for label, name in zip(labels, names, strict=True))
