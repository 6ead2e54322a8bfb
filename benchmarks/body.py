"""A body of 117 organs, drawn from ellipsoids and capsules: where they are, how large, and how bright in CT.

Places are fractions of the grid's extents, in storage order (z from the feet up, y from front to back, x from right to left), so one body
fits any grid. Organs that come later lie in front of earlier ones: nested ones follow what they lie in. `body_maps.py` draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin

Triple = tuple[float, float, float]

NUM_VERTEBRAE = 24
NUM_RIBS = 12


@dataclass(frozen=True)
class Ellipsoid:
    """Center and semi-axes (z, y, x), in fractions of the extents."""

    center: Triple
    semi_axes: Triple


@dataclass(frozen=True)
class Capsule:
    """A piece of a tube: ends (z, y, x) in fractions of the extents, radius as a fraction of the extent along x."""

    start: Triple
    end: Triple
    radius: float


Part = Ellipsoid | Capsule


@dataclass(frozen=True)
class Organ:
    """Its parts together are one label; `hounsfield` is its mean intensity."""

    name: str
    hounsfield: int
    parts: tuple[Part, ...]


def _tube(radius: float, *points: Triple) -> tuple[Part, ...]:
    return tuple(Capsule(start, end, radius) for start, end in itertools.pairwise(points))


def _blob(z: float, y: float, x: float, along_z: float, along_y: float, along_x: float) -> tuple[Part, ...]:
    return (Ellipsoid((z, y, x), (along_z, along_y, along_x)),)


def _mirrored(part: Part) -> Part:
    def flip(point: Triple) -> Triple:
        return (point[0], point[1], 1.0 - point[2])

    if isinstance(part, Ellipsoid):
        return Ellipsoid(flip(part.center), part.semi_axes)
    return Capsule(flip(part.start), flip(part.end), part.radius)


def _pair(name: str, hounsfield: int, parts: tuple[Part, ...]) -> Iterator[Organ]:
    """The organ as given, on the right, and its mirror image."""
    yield Organ(f"{name}_right", hounsfield, parts)
    yield Organ(f"{name}_left", hounsfield, tuple(map(_mirrored, parts)))


def _muscles() -> Iterator[Organ]:
    yield from _pair("gluteus_maximus", 55, _blob(0.19, 0.76, 0.30, 0.09, 0.12, 0.13))
    yield from _pair("gluteus_medius", 65, _blob(0.25, 0.66, 0.22, 0.05, 0.09, 0.08))
    yield from _pair("iliopsoas", 60, _tube(0.035, (0.16, 0.42, 0.33), (0.26, 0.52, 0.38), (0.40, 0.60, 0.43)))
    yield from _pair("autochthon", 50, _tube(0.045, (0.26, 0.80, 0.42), (0.55, 0.84, 0.41), (0.80, 0.78, 0.43)))


def _trunk() -> Iterator[Organ]:
    yield Organ("lung_upper_lobe_right", -820, _blob(0.70, 0.45, 0.29, 0.09, 0.26, 0.13))
    yield Organ("lung_middle_lobe_right", -780, _blob(0.60, 0.36, 0.28, 0.05, 0.17, 0.13))
    yield Organ("lung_lower_lobe_right", -740, _blob(0.58, 0.60, 0.28, 0.09, 0.18, 0.14))
    yield Organ("lung_upper_lobe_left", -820, _blob(0.68, 0.42, 0.72, 0.11, 0.24, 0.12))
    yield Organ("lung_lower_lobe_left", -740, _blob(0.58, 0.62, 0.72, 0.09, 0.17, 0.13))
    yield Organ("liver", 110, _blob(0.475, 0.42, 0.32, 0.075, 0.26, 0.20))
    yield Organ("spleen", 130, _blob(0.480, 0.66, 0.77, 0.05, 0.12, 0.07))
    yield Organ("stomach", 25, _blob(0.465, 0.36, 0.66, 0.05, 0.14, 0.11))
    yield Organ("pancreas", 85, _tube(0.022, (0.405, 0.46, 0.42), (0.42, 0.48, 0.54), (0.45, 0.55, 0.66)))
    yield Organ("gallbladder", 10, _blob(0.425, 0.28, 0.34, 0.025, 0.05, 0.03))
    yield from _pair("kidney", 170, _blob(0.40, 0.66, 0.31, 0.05, 0.07, 0.055))
    yield from _pair("kidney_cyst", 5, _blob(0.415, 0.68, 0.29, 0.018, 0.03, 0.024))
    yield from _pair("adrenal_gland", 65, _blob(0.46, 0.66, 0.41, 0.016, 0.035, 0.02))
    yield Organ("duodenum", 45, _tube(0.022, (0.42, 0.40, 0.44), (0.37, 0.46, 0.40), (0.35, 0.50, 0.50)))
    loops = [(0.25 + 0.008 * i, 0.36 + 0.10 * sin(1.9 * i), 0.50 + 0.13 * cos(1.3 * i)) for i in range(12)]
    yield Organ("small_bowel", 35, _tube(0.028, *loops))
    frame = ((0.24, 0.44, 0.22), (0.38, 0.40, 0.20), (0.375, 0.20, 0.50), (0.40, 0.42, 0.82), (0.26, 0.48, 0.80), (0.20, 0.62, 0.52))
    yield Organ("colon", -40, _tube(0.036, *frame))
    yield Organ("urinary_bladder", 0, _blob(0.195, 0.34, 0.50, 0.04, 0.12, 0.10))
    yield Organ("prostate", 60, _blob(0.15, 0.42, 0.50, 0.02, 0.05, 0.045))
    yield Organ("esophagus", 40, _tube(0.018, (0.50, 0.58, 0.53), (0.65, 0.60, 0.52), (0.82, 0.56, 0.51)))
    yield Organ("trachea", -950, _tube(0.020, (0.68, 0.52, 0.50), (0.84, 0.44, 0.50)))
    yield Organ("thyroid_gland", 140, _blob(0.815, 0.36, 0.50, 0.02, 0.05, 0.06))


def _heart_and_vessels() -> Iterator[Organ]:
    yield Organ("heart_myocardium", 95, _blob(0.590, 0.35, 0.56, 0.065, 0.17, 0.14))
    yield Organ("heart_ventricle_left", 190, _blob(0.575, 0.36, 0.62, 0.035, 0.09, 0.055))
    yield Organ("heart_ventricle_right", 160, _blob(0.575, 0.29, 0.51, 0.035, 0.08, 0.05))
    yield Organ("heart_atrium_left", 200, _blob(0.625, 0.44, 0.57, 0.022, 0.06, 0.06))
    yield Organ("heart_atrium_right", 150, _blob(0.620, 0.33, 0.46, 0.025, 0.06, 0.04))
    arch = ((0.64, 0.38, 0.52), (0.71, 0.40, 0.50), (0.725, 0.52, 0.54), (0.68, 0.64, 0.55), (0.45, 0.64, 0.53), (0.28, 0.58, 0.51))
    yield Organ("aorta", 210, _tube(0.024, *arch))
    yield Organ("inferior_vena_cava", 140, _tube(0.022, (0.28, 0.58, 0.45), (0.45, 0.56, 0.44), (0.60, 0.40, 0.44)))
    yield Organ("superior_vena_cava", 180, _tube(0.018, (0.64, 0.36, 0.43), (0.74, 0.38, 0.43)))
    yield Organ("portal_vein", 165, _tube(0.015, (0.41, 0.44, 0.50), (0.45, 0.46, 0.42), (0.47, 0.46, 0.34)))
    yield Organ("pulmonary_vein", 185, _tube(0.014, (0.63, 0.50, 0.36), (0.63, 0.50, 0.68)))
    yield Organ("brachiocephalic_trunk", 205, _tube(0.013, (0.725, 0.42, 0.49), (0.78, 0.42, 0.44)))
    yield from _pair("brachiocephalic_vein", 175, _tube(0.014, (0.745, 0.36, 0.44), (0.775, 0.38, 0.34)))
    yield from _pair("subclavian_artery", 200, _tube(0.012, (0.77, 0.45, 0.42), (0.785, 0.44, 0.28), (0.76, 0.42, 0.16)))
    yield from _pair("common_carotid_artery", 195, _tube(0.011, (0.77, 0.44, 0.44), (0.88, 0.46, 0.42)))
    yield from _pair("iliac_artery", 205, _tube(0.014, (0.28, 0.58, 0.49), (0.22, 0.52, 0.40), (0.12, 0.36, 0.33)))
    yield from _pair("iliac_vein", 135, _tube(0.015, (0.27, 0.61, 0.46), (0.21, 0.56, 0.38), (0.12, 0.40, 0.31)))


def _bones() -> Iterator[Organ]:
    yield from _pair("hip", 480, _tube(0.040, (0.15, 0.40, 0.40), (0.19, 0.55, 0.27), (0.28, 0.62, 0.25)))
    yield from _pair("femur", 620, _tube(0.038, (0.0, 0.48, 0.25), (0.13, 0.50, 0.22), (0.18, 0.52, 0.28)))
    yield from _pair("humerus", 600, _tube(0.030, (0.55, 0.52, 0.07), (0.74, 0.52, 0.09)))
    yield from _pair("scapula", 420, _blob(0.69, 0.82, 0.22, 0.06, 0.03, 0.09))
    yield from _pair("clavicula", 520, _tube(0.016, (0.765, 0.24, 0.46), (0.785, 0.36, 0.18)))
    for side, across in (("right", 1.0), ("left", -1.0)):
        for number in range(1, NUM_RIBS + 1):
            top, width = 0.765 - 0.024 * number, 0.24 + 0.16 * sin(pi * (number + 1) / 15)
            angles = [pi * k / 6 for k in range(6 if number < 11 else 4)]
            arc = [(top - 0.008 * k, 0.50 + 0.37 * cos(a), 0.5 - across * (0.06 + width * sin(a))) for k, a in enumerate(angles)]
            yield Organ(f"rib_{side}_{number}", 380 + 10 * number, _tube(0.011, *arc))
    yield Organ("sternum", 350, _tube(0.022, (0.56, 0.11, 0.5), (0.74, 0.15, 0.5)))
    yield Organ("costal_cartilages", 150, _tube(0.016, (0.53, 0.14, 0.30), (0.60, 0.12, 0.45), (0.60, 0.12, 0.55), (0.53, 0.14, 0.70)))
    yield Organ("sacrum", 400, _blob(0.25, 0.74, 0.50, 0.045, 0.07, 0.09))
    for number in range(NUM_VERTEBRAE):
        body = _blob(0.30 + 0.0245 * number, 0.71 - 0.002 * number, 0.5, 0.0105, 0.062 - 0.001 * number, 0.052 - 0.001 * number)
        yield Organ(f"vertebra_{number + 1}", 420 + 8 * (number % 5), body)
    yield Organ("spinal_cord", 30, _tube(0.013, (0.34, 0.79, 0.5), (0.60, 0.775, 0.5), (0.90, 0.70, 0.5)))
    yield Organ("skull", 750, _blob(0.94, 0.50, 0.50, 0.055, 0.30, 0.24))
    yield Organ("brain", 38, _blob(0.942, 0.50, 0.50, 0.045, 0.26, 0.20))


BODY = Ellipsoid((0.5, 0.5, 0.5), (4.0, 0.47, 0.48))
"""What is inside, and no organ, is soft tissue: background, but not air. The long axis makes it a cylinder."""

ORGANS = (*_muscles(), *_trunk(), *_heart_and_vessels(), *_bones())
