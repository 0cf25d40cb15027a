"""The flip test: half of the views fit a fresh field, the other half choose where they stand by it, and in turn.

Views on the wrong side of a nearly symmetric scene agree with a field that they took part in fitting, which grows two
fronts for them. A field that never saw a view has no such comfort to give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.data.views.views import resize_area, target_size
from factorkit.nerfdiff.cameras.poses import OrbitPoses, orbit_poses, turned_poses
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages.dictionary import COMPARED, candidate_errors
from factorkit.utils import distributed

MARGIN = 0.8  # by which share of its error a lattice's place has to be better than a refined direction
SIDES = 32  # pixels along the longer side of the pictures by which sides are told apart
TURNS = (0.0, 90.0, 180.0, 270.0)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of so many indices, each in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


@torch.no_grad()
def best_turns(field: Field, scene: Scene, poses: Tensor, chosen: Tensor, samples: int) -> Tensor:
    """Degrees about z [len(chosen)], one of :data:`TURNS`, by which these views agree best with the field.

    Args:
        poses: of all views, [V, 4, 4].
        chosen: indices of the views that choose.
    """
    size = target_size(min(SIDES, max(scene.size)), *scene.size)
    images = resize_area(scene.images[chosen], *size).movedim(1, -1)

    def errors(rows: slice) -> Tensor:
        each = []
        for turn in TURNS:
            seen = render_views(field, turned_poses(poses[chosen[rows]], turn), scene.optics, size, samples).color
            each.append((seen - images[rows]).square().mean((1, 2, 3)))
        return torch.stack(each, 1)

    least = distributed.map_shares(errors, len(chosen)).argmin(1)
    return torch.tensor(TURNS).to(poses)[least]


@torch.no_grad()
def called_back(field: Field, scene: Scene, found: OrbitPoses, chosen: Tensor, places: Tensor, samples: int) -> Tensor:
    """The directions [len(chosen), 3] of these views, those that went astray exchanged for one of ``places`` [D, 3].

    A refined direction agrees better with the field than the nearest place of a lattice does, unless it is far from
    where the view was taken: so a place has to be better by a margin.
    """
    images = scene.images[chosen]
    size = target_size(min(COMPARED, max(scene.size)), *scene.size)
    candidates = orbit_poses(places, scene.distance)

    def own_errors(rows: slice) -> Tensor:
        seen = render_views(field, found(chosen[rows]), scene.optics, size, samples).color
        return (seen.movedim(-1, 1) - resize_area(images[rows], *size)).square().mean((1, 2, 3))

    def errors_from(rows: slice) -> Tensor:
        return candidate_errors(field, candidates[rows], scene.optics, images, samples).T

    own = distributed.map_shares(own_errors, len(chosen))
    errors = distributed.map_shares(errors_from, len(candidates)).T
    least, which = errors.min(1)
    return torch.where((least < MARGIN * own)[:, None], places[which], found.direction[chosen])
