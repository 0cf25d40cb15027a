"""The guided filter compared with its definition, window by window, and with known properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from factorkit.nn.guided_filter import apply_guided_filter, fit_guided_filter, guided_filter, resize_rows


def make_inputs(height=9, width=12, channels=3, regions=2, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(height * 100 + width)
    guide = torch.rand(batch, channels, height, width, generator=generator, dtype=dtype)
    return guide, torch.randn(batch, regions, height, width, generator=generator, dtype=dtype).softmax(1)


def filter_by_definition(guide, values, radius, eps):
    """Equations 14 to 16 of the paper, one least-squares problem per window."""
    batch, channels, height, width = guide.shape
    total, count = torch.zeros_like(values), torch.zeros(height, width, dtype=values.dtype)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                rows = slice(max(0, y - radius), y + radius + 1)
                columns = slice(max(0, x - radius), x + radius + 1)
                colours = guide[b, :, rows, columns].flatten(1).T
                design = torch.cat([colours, torch.ones(len(colours), 1, dtype=guide.dtype)], 1)
                ridge = torch.diag(torch.tensor([eps] * channels + [0.0], dtype=guide.dtype)) * len(colours)
                wanted = values[b, :, rows, columns].flatten(1).T
                result = torch.linalg.solve(design.T @ design + ridge, design.T @ wanted)
                here = torch.einsum("cyx,ck->kyx", guide[b, :, rows, columns], result[:-1]) + result[-1][:, None, None]
                total[b, :, rows, columns] += here
                if b == 0:
                    count[rows, columns] += 1
    return total / count


@pytest.mark.parametrize(("height", "width", "channels", "radius"), [(9, 12, 3, 2), (5, 7, 1, 1), (4, 6, 2, 9)])
def test_guided_filter_equals_averaged_ridge_regressions(height, width, channels, radius):
    """The definition averages the windows' linear functions at a pixel, the filter their coefficients."""
    guide, values = make_inputs(height, width, channels)
    result = guided_filter(guide, values, radius, 1e-3)
    expected = filter_by_definition(guide, values, radius, 1e-3)
    # Each pixel lies in as many windows as surround it, so the box average equals the definition's.
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (17, 1), (3, 2)])
def test_guided_filter_image_below_window_works(size):
    guide, values = make_inputs(*size)
    torch.testing.assert_close(guided_filter(guide, values, 8, 1e-3), filter_by_definition(guide, values, 8, 1e-3))


def test_guided_filter_constant_inputs_keep_or_blur():
    guide, values = make_inputs()
    constant = torch.full_like(values, 0.37)
    torch.testing.assert_close(guided_filter(guide, constant, 2, 1e-3), constant)
    blur = lambda x: F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)  # noqa: E731
    torch.testing.assert_close(guided_filter(torch.full_like(guide, 0.6), values, 2, 1e-3), blur(blur(values)))


def test_guided_filter_is_linear_and_keeps_the_sum():
    guide, values = make_inputs()
    other = make_inputs(regions=2, dtype=torch.float64)[1].flip(2)
    run = lambda v: guided_filter(guide, v, 2, 1e-3)  # noqa: E731
    torch.testing.assert_close(run(2 * values - 3 * other), 2 * run(values) - 3 * run(other))
    torch.testing.assert_close(run(values).sum(1), torch.ones(2, 9, 12, dtype=torch.float64))


def test_guided_filter_linear_function_of_colours_is_reproduced():
    guide, _ = make_inputs()
    values = (0.3 * guide[:, :1] - 0.2 * guide[:, 1:2] + 0.5 * guide[:, 2:] + 0.1).expand(-1, 2, -1, -1)
    torch.testing.assert_close(guided_filter(guide, values, 2, 1e-12), values, rtol=1e-6, atol=1e-6)


def test_guided_filter_blurred_mask_follows_the_image_edge():
    guide = torch.zeros(1, 3, 40, 40)
    guide[..., 20:] = torch.tensor([0.7, 0.2, 0.1])[:, None, None]
    edge = (guide[:, :1] > 0).float()
    blurred = F.avg_pool2d(edge, 9, 1, 4, count_include_pad=False)
    result = guided_filter(guide, blurred, 8, 1e-4)
    assert (blurred - edge).abs().max() > 0.4
    assert (result - edge).abs().max() < 0.25 and (result[..., 19].mean() < 0.25) and (result[..., 20].mean() > 0.75)
    grey = guided_filter(torch.full_like(guide, 0.5), blurred, 8, 1e-4)
    assert (grey - edge).abs().max() > 0.4, "an image without an edge gives the mask no edge"


def test_apply_guided_filter_coarse_fit_follows_the_fine_edge():
    """Joint upsampling: the mask has 8 x 8 pixels, the image 67 x 67, and its edge cuts through the mask's cells."""
    large = torch.zeros(1, 3, 67, 67)
    large[..., 30:] = 0.8
    small = F.interpolate(large, size=(8, 8), mode="area")
    mask = torch.cat([small[:, :1] / 0.8, 1 - small[:, :1] / 0.8], 1)
    result = apply_guided_filter(fit_guided_filter(small, mask, 1, 1e-4), large)
    assert (result[:, 0] - (large[:, 0] > 0).float()).abs().max() < 0.1
    plain = F.interpolate(mask, size=(67, 67), mode="bilinear")
    assert (plain[:, 0] - (large[:, 0] > 0).float()).abs().max() > 0.4


@pytest.mark.parametrize("size", [(50, 70), (7, 5), (9, 12)])
def test_apply_guided_filter_bands_equal_the_whole(size, monkeypatch):
    guide, values = make_inputs(dtype=torch.float32)
    result = fit_guided_filter(guide, values, 2, 1e-3)
    large = torch.rand(2, 3, *size)
    whole = apply_guided_filter(result, large)
    interpolated = F.interpolate(
        torch.cat([result.slope.flatten(1, 2), result.offset], 1).float(), size=size, mode="bilinear"
    )
    expected = (interpolated[:, :6].unflatten(1, (2, 3)) * large[:, None]).sum(2) + interpolated[:, 6:]
    torch.testing.assert_close(whole, expected)
    monkeypatch.setattr("factorkit.nn.guided_filter.PIXELS_PER_BAND", 2 * size[1])
    torch.testing.assert_close(apply_guided_filter(result, large), expected)
    part = apply_guided_filter(result, large[:, :, 3:6], slice(3, 6), size[0])
    torch.testing.assert_close(part, expected[:, :, 3:6])
    rows = resize_rows(values, size[0], slice(2, 5), size[1])
    torch.testing.assert_close(rows, F.interpolate(values, size=size, mode="bilinear")[:, :, 2:5])


@pytest.mark.slow
def test_guided_filter_gradients_are_correct():
    guide, values = (x.requires_grad_() for x in make_inputs(4, 5, batch=1))
    large = torch.rand(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    fit_and_apply = lambda g, v, full: apply_guided_filter(fit_guided_filter(g, v, 1, 1e-2), full)  # noqa: E731
    assert torch.autograd.gradcheck(fit_and_apply, (guide, values, large))


def test_guided_filter_invalid_arguments_raise():
    guide, values = make_inputs()
    with pytest.raises(ValueError, match="one grid"):
        fit_guided_filter(guide, values[:, :, 1:], 1, 1e-3)
    with pytest.raises(ValueError, match="channels"):
        fit_guided_filter(guide.repeat(1, 2, 1, 1), values, 1, 1e-3)
    with pytest.raises(ValueError, match="radius=0"):
        fit_guided_filter(guide, values, 0, 1e-3)
    with pytest.raises(ValueError, match="eps=0"):
        fit_guided_filter(guide, values, 1, 0)
    with pytest.raises(ValueError, match="coefficients are of"):
        apply_guided_filter(fit_guided_filter(guide, values, 1, 1e-3), guide[:1])
