"""A denoiser behind its conditions: what a cache keeps is what the network would see without one."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from praxino.diffusion import rollout
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.path import RectifiedFlow
from praxino.diffusion.solve import Solver
from praxino.models.conditioning import Condition
from praxino.models.dit import VideoDiT
from praxino.tasks.generation.guided import Guidance, Guided

PATH, NOISE = RectifiedFlow(), FrameNoise([1, 2], (4, 2, 2))


def make_net() -> VideoDiT:
    """Return a causal net whose weights are nowhere zero."""
    torch.manual_seed(0)
    net = VideoDiT(4, width=32, depth=2, num_heads=2, patch=(1, 1, 1), attention="causal", classes=3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("count", [0, 2])
def test_a_cache_shows_finished_frames_as_windows_do(scale: float, marks: bool, count: int) -> None:
    net, solver = make_net(), Solver(PATH, "flow", "euler", 4)
    given = torch.randn(2, 4, count, 2, 2) if count else None
    cond = Condition(label=torch.tensor([0, 2]))

    def model(cached: bool) -> Guided:
        return Guided(net, cond, Guidance(scale), frozenset({"label"}), PATH, NOISE, cached, marks)

    def joined(pieces: Iterator[Tensor]) -> Tensor:
        return torch.cat(list(pieces), dim=2)

    windows = joined(rollout.autoregressive(model(False), NOISE, solver, 6, window=6, block=2, given=given))
    cache = joined(rollout.cached(model(True), NOISE, solver, 6, block=2, given=given, window=6))
    torch.testing.assert_close(cache, windows, atol=1e-5, rtol=1e-5)
    assert windows.std() > 0.1


@pytest.mark.parametrize("away", ["label", "known"])
def test_guidance_costs_nothing_outside_its_interval_beside_given_frames(
    away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, solver, calls = make_net(), Solver(PATH, "flow", "euler", 4), []
    monkeypatch.setattr(net, "forward", lambda z, *_: calls.append(z) or torch.zeros_like(z))
    guidance, cond = Guidance(3.0, (0.0, 0.6)), Condition(label=torch.tensor([0, 2]))
    model = Guided(net, cond, guidance, frozenset({away}), PATH, NOISE)
    list(rollout.full(model, NOISE, solver, 4, torch.randn(2, 4, 2, 2, 2)))
    assert len(calls) == 4 + 2  # guided at the times 0.5 and 0.25, not at 1 and 0.75
