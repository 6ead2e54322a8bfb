"""Small labeled cases for the tests of training, in folders and in memory."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from cli_helpers import save_nifti

from crfrefine.arrays.network import ArrayNetwork
from crfrefine.base.observer import Observer
from crfrefine.cases.case import Case
from crfrefine.cases.finding import locate_folders
from crfrefine.demo.phantom import NUM_LABELS, make_phantom, write_phantom
from crfrefine.io.volume import header_of_grid
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.sections import IntensityParameters, PostprocessParameters
from crfrefine.statistics.comparison import Measurement, ResultTable
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.choice import CRF, Candidate, no_crf
from crfrefine.train.comparison import Training
from crfrefine.train.crops import make_crop
from crfrefine.train.dataset import LabeledCases
from crfrefine.train.fit import fit_starts
from crfrefine.train.losses import make_loss
from crfrefine.train.material import Material
from crfrefine.train.options import LEARNABLE, TrainingOptions
from crfrefine.train.plan import Split, split_training
from crfrefine.train.progress import Progress
from crfrefine.train.starts import with_values_to_learn
from crfrefine.train.workers import Workers

GRID_SHAPE = (12, 11, 8)  # no two axes alike
SPACING = (5.4, 5.5, 7.6)  # mm, nor two spacings
# the same anatomy, for what needs more of its details,
FINER = {
    "shape": (14, 13, 9),
    "spacing": (4.6, 4.7, 6.7),
}
# or many more: a training takes twice as long with each
LARGER = {
    "shape": (18, 15, 11),
    "spacing": (3.6, 4.1, 5.5),
}
SIZES = (NUM_LABELS, 2, 3)
WORKERS = Workers(2)
REGIONS = tuple((label,) for label in range(1, NUM_LABELS))


def phantom(seed, kind="useful", *, shape=GRID_SHAPE, spacing=SPACING):
    """A case whose image is "useful" or "noise" alone.

    Its logits are "right" already, or right on labels of "scattered" voxels.
    """
    case = make_phantom(seed, shape, spacing)
    random = np.random.default_rng(seed)
    if kind == "noise":
        return replace(case, image=random.integers(1, 2000, case.image.shape).astype(np.float32))
    if kind == "right":
        right = np.eye(NUM_LABELS, dtype=np.float32)[case.labels].transpose(
            3, 0, 1, 2
        ) * 6 + random.normal(0, 0.5, case.logits.shape)
        return replace(case, logits=right.astype(np.float32))
    if kind == "scattered":
        labels = (
            random.integers(1, NUM_LABELS, case.labels.shape)
            * (random.random(case.labels.shape) < 0.1)
        ).astype(np.uint8)
        return replace(
            case,
            labels=labels,
            logits=3 * np.eye(NUM_LABELS, dtype=np.float32)[labels].transpose(3, 0, 1, 2),
        )
    return case


def shorten(patch):
    """Have runs fit the recalibration in two steps, and train from one start, which suits the
    phantoms.
    """
    patch.setattr("crfrefine.train.baselines.SCALING_STEPS", 2)
    for name, values in (
        ("THETA_ALPHA_VOXELS", (2.0,)),
        ("THETA_BETAS", (0.15,)),
        ("WEIGHTS", (8.0,)),
    ):
        patch.setattr(f"crfrefine.train.starts.{name}", values)


def shorten_choice(patch, *theta_alphas):
    """Have parameters chosen without labels from few sets and draws of synthetic cases."""
    for name, value in (
        ("unlabeled.NUM_SEEDS", 1),
        ("unlabeled.MIN_DRAWS", 4),
        ("unlabeled_choice.THETA_ALPHA_VOXELS", theta_alphas),
    ):
        patch.setattr(f"crfrefine.train.{name}", value)


def write_cases(root, count, kind="useful", *, network=None, **grid):
    """Cases in folders; `network` makes of each what its file holds instead of the logits."""
    for seed in range(count):
        case = phantom(seed, kind, **grid)
        write_phantom(case, root, f"case{seed}")
        if network is not None:
            save_nifti(root / "logits" / f"case{seed}.nii.gz", network(case), case.affine)
    return root


def options_of(folder, **options):
    """The options of a training on the cases in a folder."""
    return TrainingOptions(**locate_folders(folder), **{"output": folder / "p.toml", **options})


def cases_in(folder, **options):
    """The cases that a training finds in a folder."""
    return LabeledCases(options_of(folder, **options), CrfParameters())


def table_of_gains(gains):
    """Dice of one structure in 20 cases for each method, about as much above 0.7 as its gain; drawn
    in the order of the methods.
    """
    random = np.random.default_rng(0)
    values = [
        (name, case, 0.7 + gain + 0.005 * random.random())
        for name, gain in gains.items()
        for case in range(20)
    ]
    return ResultTable(
        [
            Measurement(f"case{case:02d}", "tumor", "dice", value, name)
            for name, case, value in values
        ]
    )


def as_case(case, case_id="case"):
    like = header_of_grid(case.image.shape[1:], case.affine)
    return Case(
        case_id,
        case.image,
        ArrayNetwork(case.logits),
        None,
        like,
        case.spacing,
        "logits",
        labels=case.labels,
    )


def crops(count, kind="useful", **grid):
    return [
        make_crop(as_case(phantom(seed, kind, **grid), f"case{seed}"), IntensityParameters())
        for seed in range(count)
    ]


def material(cases, learn=LEARNABLE, workers=WORKERS):
    plan = SimpleNamespace(
        learn=learn,
        regions={str(labels): labels for labels in REGIONS},
        cases=SimpleNamespace(sizes=SIZES),
        options=SimpleNamespace(seed=3, lesions=None),
    )
    progress = Progress(Observer(), num_folds=2, num_steps=4)
    return Material(plan, cases, make_loss("ce+dice", REGIONS), workers, progress)


def start(theta_alpha, weight=4.0):
    values = {
        "bilateral.theta_alpha": theta_alpha,
        "bilateral.theta_beta": 0.1,
        "bilateral.weight": weight,
    }
    parameters = CrfParameters().replace(**values, **{"mean_field.temperature": 0.7})
    prepared = with_values_to_learn(parameters, LEARNABLE, NUM_LABELS, 2)
    return Candidate(CRF, f"theta_alpha {theta_alpha:g}", prepared)


def learned_by(model):
    """The parameters of a model that may move, each with its name."""
    named = model.layer.named_parameters()
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def fit(cases, *, num_optimizer_steps=6, threads=2):
    """The trajectories of a training, the best one first."""
    split = split_training(range(len(cases)), seed=1)
    starts = [start(4.0), start(8.0)]
    with Workers(threads) as workers:
        shared = material(cases, workers=workers)
        return fit_starts(shared, split, starts, num_optimizer_steps, lambda *_: None)


def finished_fold():
    """A fold that is finished."""
    measured = {"case1": {"network": {"core": {"dice": 0.1 + 0.2, "hd95_mm": 3.0}}}}
    return Training(
        "fold 1",
        Split((0, 2), (3,), (1,)),
        no_crf(CrfParameters(), (0.25, -0.5)),
        0.7,
        {"a": [{"iteration": 0, "score": 0.1}]},
        (),
        VectorScaling(0.9, (0.1, -0.1)),
        PostprocessParameters(keep_largest="each"),
        measured=measured,
    )


def tuned(parameters, scaling, rule):
    """A training that chose a CRF with these parameters, and its rivals' settings."""
    chosen = Candidate(CRF, "start", parameters, 0, ())
    nobody = Split((), (), ())
    return Training("fold 1", nobody, chosen, 0.0, {}, (), VectorScaling(*scaling), rule)


class Shares(Observer):
    """Notes the shares of a run that were shown."""

    def __init__(self):
        self.shares = []

    def progressed(self, fraction, done=""):
        self.shares.append(fraction)
