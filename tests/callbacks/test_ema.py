"""The average moves on steps only, is kept apart, and is restored exactly."""

import copy

import pytest
import torch
from torch import nn

from praxino.callbacks.ema import EMA
from praxino.errors import ConfigError
from training import Data, load, make_module, make_net, train


def test_update_by_hand():
    net, ema = nn.Linear(1, 1, bias=False), EMA(decay=0.5, ramp=True)
    average = copy.deepcopy(net)
    net.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    expected = 0.0
    for n in range(12):
        ema.update(net, average)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert average.weight.item() == pytest.approx(expected)
    assert ema.updates == 12


def test_buffers_are_copied():
    net = nn.BatchNorm1d(2)
    average = copy.deepcopy(net)
    net.running_mean.fill_(3.0)
    net.num_batches_tracked.fill_(20)
    EMA(decay=0.9).update(net, average)
    assert average.running_mean.tolist() == [3.0, 3.0]
    assert average.num_batches_tracked.item() == 20


def test_average_of_a_training(tmp_path):
    """One update a step, not a batch; equal to a loop over the weights."""
    module = make_module(accumulate=2)
    start = module.net.decoder.conv_out.weight.detach().clone()
    seen: list[torch.Tensor] = []
    real = module._make_step

    def spy(turn):
        real(turn)
        seen.append(module.net.decoder.conv_out.weight.detach().clone())

    module._make_step = spy
    ema = EMA(decay=0.9, ramp=False)
    train(tmp_path, steps=5, module=module, ema=ema)
    for weight in seen:
        start = torch.lerp(start, weight, 0.1)
    assert torch.equal(module.ema_net.decoder.conv_out.weight, start)
    assert ema.updates == 5
    assert not any(p.requires_grad for p in module.ema_net.parameters())
    assert not any("ema" in name for name in module.state_dict())
    assert not module.ema_net.training


def test_every_second_step(tmp_path):
    ema = EMA(decay=0.9, every=2)
    train(tmp_path, steps=5, ema=ema)
    assert ema.updates == 2


def test_checkpoint_holds_the_weights_of_the_network(tmp_path):
    module = make_module()
    train(tmp_path, steps=2, module=module)
    ema = load(tmp_path / "checkpoints" / "step-00000002.ckpt")["ema"]
    assert (ema["decay"], ema["updates"]) == (0.9, 2)
    net = make_net(seed=1)
    net.load_state_dict(ema["weights"])
    video = torch.zeros(1, 3, 5, 16, 16)
    assert torch.equal(net.encode(video).mean, module.ema_net.encode(video).mean)


def test_resume_of_a_run_without_an_average(tmp_path, caplog):
    train(tmp_path, steps=2)
    path = tmp_path / "checkpoints" / "step-00000002.ckpt"
    checkpoint = load(path)
    del checkpoint["ema"]
    torch.save(checkpoint, path)
    module = make_module()
    ema = EMA(decay=0.0, ramp=False)
    train(tmp_path, steps=3, module=module, data=Data(), resume=path, ema=ema)
    assert "holds no EMA" in caplog.text
    assert ema.updates == 1
    assert torch.equal(module.ema_net.decoder.conv_out.weight, module.net.decoder.conv_out.weight)


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigError):
        EMA(**wrong)
