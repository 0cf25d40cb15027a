"""The runs of benchmarks/alarms.py: images or scenes, seeds, and what is made wrong in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SegdiffRuns:
    """One training, stopped and judged at several steps."""

    images: str
    seed: int
    stops: tuple[int, ...]
    kind: Literal["U-Net", "mixture", "objects", "teacher"] = "U-Net"
    resolution: int = 16
    changes: tuple[tuple[str, Any], ...] = ()

    def key(self, stop: int) -> str:
        changes = "".join(f" {name}={value}" for name, value in self.changes)
        return f"segdiff {self.images} {self.kind} {self.resolution} px{changes} seed={self.seed} steps={stop}"


@dataclass(frozen=True)
class NerfdiffRun:
    """A scene with cameras, right or made wrong."""

    scene: str
    seed: int
    fault: str = ""

    def key(self) -> str:
        return f"nerfdiff {self.scene} {self.fault or 'right'} seed={self.seed}"


def mixtures(
    images: str, regions: int, *seeds: int, stops: tuple[int, ...] = (120,), px: int = 16
) -> list[SegdiffRuns]:
    changes = (("regions", regions), ("random_flip", not (images == "horses" and regions == 3)))
    return [SegdiffRuns(images, seed, stops, "mixture", px, changes) for seed in seeds]


def networks(images: str, seed: int, *stops: int, **changes: Any) -> SegdiffRuns:
    return SegdiffRuns(images, seed, stops, changes=tuple(changes.items()))


def objects(images: str, regions: int, *seeds: int, steps: int = 100) -> list[SegdiffRuns]:
    """Return runs with masks="auto" at 32 px, whose stop is the length of the stage of the mask network."""
    changes = (("regions", regions), ("random_flip", images != "horses"))
    return [SegdiffRuns(images, seed, (steps,), "objects", 32, changes) for seed in seeds]


def teacher(images: str, regions: int | None, seed: int = 0, **changes: Any) -> SegdiffRuns:
    """Return a run of 3 seconds with the teacher's masks of masks="auto" at 32 px; its stop is that of the mixture.

    Without ``regions`` the run chooses them, and takes 7 seconds.
    """
    settings = ({} if regions is None else {"regions": regions}) | {"random_flip": False} | changes
    return SegdiffRuns(images, seed, (settings.pop("mixture_steps", 120),), "teacher", 32, tuple(settings.items()))


WITH_OBJECTS = [  # images, and the regions of the run
    ("flowers17, first 60", 2),
    ("flowers17, grey", 2),
    ("flowers17, noisy 20", 2),
    ("flowers17, negative", 3),
    ("flowers17, and horses", 3),
    ("horses, first 60", 3),
    ("horses, grey", 3),
    ("horses, noisy 20", 2),
    ("flowers, first 30", 2),
    ("flowers, grey", 2),
    ("flowers, noisy 40", 3),
    ("flowers, and flowers17", 2),
    ("discs", 2),
    ("discs, grey", 3),
    ("frames", 2),
]
SEEDED = [
    ("flowers", 2),
    ("flowers", 3),
    ("flowers17", 3),
    ("horses", 2),
    ("persons", 2),
    ("persons", 3),
    ("plain", 2),
    ("smooth", 2),
    ("smooth", 3),
    ("texture", 2),
    ("texture", 3),
    ("landscape", 2),
    ("noise", 2),
]
WITHOUT_OBJECTS = [
    ("flowers17, shuffled 1", 2),
    ("flowers17, shuffled 4", 2),
    ("flowers17, shuffled 8", 3),
    ("horses, shuffled 4", 3),
    ("horses, shuffled 8", 2),
    ("flowers17, corners", 2),
    ("horses, corners", 3),
    ("leaves", 2),
    ("leaves", 3),
    ("leaves, grey", 2),
    ("stripes", 2),
    ("halves", 2),
    ("one colour", 2),
    ("one colour, noisy 20", 3),
]
# Images and seeds of runs that choose their regions, made after all limits were set
CHOOSING = [
    ("noise", 1),
    ("texture", 1),
    ("flowers17, blurred 2", 7),
    ("flowers17, dark", 7),
    ("flowers17, noisy 60", 7),
    ("flowers17, rolled", 7),
    ("flowers17, tinted", 7),
    ("flowers17, upside-down", 7),
    ("horses, tinted", 7),
    ("horses, upside-down", 7),
    ("persons, tinted", 7),
    ("frames, grey", 8),
    ("texture, grey", 8),
    ("flowers, rows", 9),
    ("flowers17, rows", 9),
    ("flowers17, shuffled 16", 9),
    ("horses, rows", 9),
    ("horses, shuffled 16", 9),
    ("horses, shuffled 2", 9),
    ("landscape, tinted", 9),
    ("leaves", 9),
    ("leaves, grey", 9),
    ("persons, rows", 9),
    ("plain", 9),
    ("plain, tinted", 9),
    ("smooth", 9),
]
UNUSUAL: list[dict[str, Any]] = [{"cue_weight": 0.0}, {"cue_weight": 6.0}, {"mixture_steps": 1}]
SEGDIFF = [
    *mixtures("flowers", 2, 1, stops=(2, 120)),
    *mixtures("flowers", 2, 2, 3, 4),
    *mixtures("flowers17", 2, 0, stops=(2, 40, 120)),
    *mixtures("flowers17", 2, 2, 3),
    *mixtures("flowers17", 3, 1, stops=(2, 120)),
    *mixtures("horses", 3, 0, 1, stops=(2, 120)),
    *mixtures("horses", 3, 4),
    *mixtures("horses", 2, 2),
    *mixtures("persons", 3, 0, 2, 3),
    *mixtures("persons", 2, 1, stops=(2, 120)),
    *[run for name in ("noise", "texture", "landscape", "plain") for run in mixtures(name, 2, 0, stops=(80,))],
    *[run for name in ("noise", "texture") for run in mixtures(name, 3, 1, stops=(80,))],
    *mixtures("flowers17", 2, 0, stops=(2, 120), px=32),
    *mixtures("flowers", 2, 0, px=32),
    *mixtures("horses", 3, 0, px=32),
    *mixtures("horses", 2, 1, px=32),
    *mixtures("persons", 3, 0, px=32),
    *mixtures("noise", 2, 0, stops=(80,), px=32),
    *mixtures("texture", 3, 0, stops=(80,), px=32),
    *mixtures("plain", 3, 1, stops=(80,), px=32),
    networks("flowers", 0, 2, 25, 80, 200),
    networks("flowers17", 0, 2, 25, 180),
    networks("flowers17", 1, 50, 120, model_channels=16, batch_size=16),
    networks("flowers", 2, 60, mask_learning_rate=30.0),
    networks("persons", 0, 25, 140, regions=3),
    networks("persons", 1, 100),
    networks("horses", 0, 80),
    networks("texture", 0, 120),
    networks("noise", 0, 80),
    networks("landscape", 0, 25, 80),
    networks("plain", 0, 50),
    *[
        run
        for name, k in (("flowers", 2), ("flowers17", 2), ("horses", 3), ("persons", 3))
        for run in objects(name, k, 0)
    ],
    *[run for name, k in (("leaves", 2), ("smooth", 2), ("texture", 3), ("plain", 2)) for run in objects(name, k, 0)],
    *[teacher(name, regions, 1) for name, regions in SEEDED],
    *[teacher(name, regions) for name, regions in [*WITH_OBJECTS, *WITHOUT_OBJECTS]],
    *[teacher(name, None, seed) for name, seed in CHOOSING],
    *[teacher("flowers17", 2, **changes) for changes in UNUSUAL],
    *[teacher("horses", 3, **changes) for changes in UNUSUAL],
]
POSE_FAULTS = ("tilt 13", "uneven 20", "roll 15", "zoom 20", "uncentred 12", "refined tilt 13", "refined uneven 20")
FAULTS = {
    "procedural": {
        0: ("", "exchanged", "half", "mirror", "focal 2", "collapsed"),
        1: ("", "quarter", "noise", "jitter 20", "forward"),
        2: ("", "random"),
        3: ("", "first 3"),
        4: ("", *POSE_FAULTS),
        5: ("",),
    },
    "lego": {
        0: ("", "focal 0.5", "forward"),
        1: ("", "random", "first 6", "inverse"),
        2: ("", "mirror", "half", "collapsed"),
        3: ("",),
        4: ("", *POSE_FAULTS),
        5: ("",),
    },
    "fern": {
        0: ("", "exchanged"),
        1: ("", "unrelated", "mirror", "object", "one place", "focal 0.5", "backward"),
        2: ("", "exchanged"),
        3: ("", "random"),
    },
    "room": {
        0: ("", "jitter 3", "jitter 10", "exchanged"),
        1: ("", "jitter 3", "jitter 20", "mirror"),
        2: ("", "jitter 10", "jitter 20", "random"),
    },
    "square": {0: ("", "exchanged", "noise"), 1: ("", "unrelated"), 2: ("", "backward", "focal 2"), 3: ("",)},
}
NERFDIFF = [NerfdiffRun(s, seed, fault) for s, rows in FAULTS.items() for seed in rows for fault in rows[seed]]
