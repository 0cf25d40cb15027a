"""DDIM inversion against denoisers that know the answer."""

from __future__ import annotations

import pytest
import torch

from factorkit.diffusion.inversion import invert
from factorkit.diffusion.schedule import SCHEDULES, Schedule
from factorkit.utils.errors import ConfigError
from tests.diffusion.closed_forms import Gaussian, TwoPoints, draw

IMAGES = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)


def error_of_return(model, steps, images=IMAGES, t_start=251) -> float:
    """The greatest change of an image that is inverted and drawn again."""
    options = {"t_start": t_start, "steps": steps}
    x_t = invert(model, images, schedule=model.schedule, prediction=model.prediction_name, **options)
    return (draw(model, images.shape, sampler="ddim", x_start=x_t, clip=True, **options).images - images).abs().max()


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("t_start", [251, 1000])
def test_invert_more_steps_return_the_image_better_in_second_order(kind, t_start):
    """Without the correction the error falls in first order, by a factor of 4 from each to the next."""
    model = Gaussian(Schedule(1000, kind), 0.1, 0.5, "v")
    errors = [error_of_return(model, steps, t_start=t_start) for steps in (10, 40, 160)]
    assert errors[1] < errors[0] / 10 and errors[2] < errors[1] / 10 and errors[2] < 1e-3, errors


def test_invert_all_steps_return_the_image_exactly():
    assert error_of_return(Gaussian(Schedule(1000), 0.1, 0.5, "eps"), 251) < 3e-5
    points = 0.6 * torch.tensor([1.0, -1, -1, 1]).view(1, 1, 2, 2)
    assert error_of_return(TwoPoints(Schedule(1000), 0.6, 0.5), 10, points) < 3e-5


def test_invert_follows_the_flow_of_probability():
    model = Gaussian(Schedule(1000), 0.1, 0.5)
    x_t = invert(model, IMAGES, schedule=model.schedule, prediction="v", steps=250, t_start=251)
    start = model.flow(IMAGES, 0, 250)  # time 0 and the clean image differ by its noise of 1%
    torch.testing.assert_close(x_t.double(), start, atol=0.02, rtol=0)


def test_invert_impossible_steps_raise():
    model = Gaussian(Schedule(50), 0.0, 0.5)
    with pytest.raises(ConfigError, match="steps=60 is not possible from t_start=50"):
        invert(model, IMAGES, schedule=model.schedule, prediction="v", steps=60, t_start=50)
