"""Rotary embedding: a rotation, of relative places only."""

import math

import pytest
import torch

from praxino.errors import ConfigError
from praxino.ops.position import rotary_table, rotate, share


def places(grid):
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).double()


@pytest.mark.parametrize(("width", "axes"), [(64, (0, 1, 2)), (128, (0, 1, 2)), (10, (1, 2)), (2, (0,)), (6, (0, 2))])
def test_every_pair_has_an_axis(width, axes):
    widths = share(width, axes)
    assert sum(widths) == width
    assert all(w % 2 == 0 for w in widths)
    assert all(widths[axis] == 0 for axis in {0, 1, 2} - set(axes))


@pytest.mark.parametrize("width", [0, 1, 33])
def test_odd_heads_are_refused(width):
    with pytest.raises(ConfigError, match=f"qk_dim={width} cannot be rotated: use an even width"):
        share(width)


def test_the_formula():
    """Pair i of an axis turns by place * base ** (-2i / width of the axis)."""
    grid, widths, base, start = (2, 3, 4), (4, 2, 6), 50.0, 7
    cos, sin = rotary_table(grid, widths, base, start, dtype=torch.float64)
    for n, (t, h, w) in enumerate(places(grid)):
        frame, place = divmod(n, 12)
        angles = [(t + start) * base ** (-2 * i / 4) for i in range(2)] + [h]
        angles += [w * base ** (-2 * i / 6) for i in range(3)]
        for i, angle in enumerate(angles):
            assert math.isclose(cos[frame, place, i], math.cos(angle), abs_tol=1e-12)
            assert math.isclose(sin[frame, place, i], math.sin(angle), abs_tol=1e-12)


def test_a_rotation_of_complex_numbers():
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    table = rotary_table((3, 2, 2), (4, 2, 2), dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(table[0], table[1])[:, :, None]
    torch.testing.assert_close(rotate(x, table), torch.cat((turned.real, turned.imag), dim=-1))
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("width", [8, 30, 64])
def test_products_depend_on_relative_places_only(width):
    """Float32, every axis: the product of a query and a key stays when both move."""
    torch.manual_seed(0)
    grid, widths = (6, 6, 6), share(width)
    q, k = (torch.randn(width) / width**0.5 for _ in range(2))
    table = rotary_table(grid, widths, base=100.0)
    turned = [rotate(x.expand(1, 6, 36, 1, width), table).view(6, 6, 6, width) for x in (q, k)]
    for axis in range(3):
        a, b = (x.movedim(axis, 0) for x in turned)
        products = torch.stack([(a[i] * b[i + 2]).sum(-1) for i in range(4)])
        assert (products - products[0]).abs().max() < 1e-5
        if widths[axis]:
            assert ((a[0] * a[0]).sum(-1) - (a[0] * a[3]).sum(-1)).min() > 1e-2


def test_start_moves_the_frames():
    table = rotary_table((5, 2, 3), (4, 4, 4))
    torch.testing.assert_close(rotary_table((2, 2, 3), (4, 4, 4), start=3), table[:, 3:], rtol=0, atol=0)


def test_far_places_keep_relative_products():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 1, 64) / 8 for _ in range(2))
    products = []
    for start in (0, 500):
        table = rotary_table((2, 1, 1), share(64), start=start)
        products.append((rotate(q, table)[:, 0] * rotate(k, table)[:, 1]).sum())
    assert abs(products[0] - products[1]) < 1e-5


def test_half_precision_turns_in_float32():
    x = torch.randn(1, 4, 6, 2, 16)
    table = rotary_table((4, 2, 3), share(16), start=300)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    exact = rotate(x.bfloat16().float(), table)
    torch.testing.assert_close(rotate(x.bfloat16(), table), exact.bfloat16(), rtol=0, atol=0)
