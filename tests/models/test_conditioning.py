"""Conditions and how they are embedded."""

import math

import pytest
import torch

from praxino.models.conditioning import Condition, LabelEmbedding, TextEmbedding, TimeEmbedding


def full(batch=2):
    return Condition(
        known=torch.tensor([[True, True, False]]).repeat(batch, 1),
        first=torch.ones(batch, dtype=torch.bool),
        label=torch.arange(batch),
        text=torch.randn(batch, 4, 5),
        text_mask=torch.tensor([[True, True, True, False]]).repeat(batch, 1),
    )


def same(a, b):
    assert a.given().keys() == b.given().keys()
    assert all(torch.equal(value, b.given()[name]) for name, value in a.given().items())


def test_dropping_makes_null():
    cond, where = full(), torch.tensor([False, True])
    dropped = cond.drop({"label", "text"}, where)
    assert dropped.label.tolist() == [0, -1]
    assert dropped.text_mask.tolist() == [[True, True, True, False], [False] * 4]
    assert torch.equal(dropped.known, cond.known)
    same(cond.drop({"label"}, where), Condition(cond.known, cond.first, dropped.label, cond.text, cond.text_mask))
    assert Condition(text=cond.text).drop({"text"}, where).text_mask.tolist() == [[True] * 4, [False] * 4]
    same(cond.without({"label", "text"}), cond.drop({"label", "text"}, torch.tensor([True, True])))
    same(Condition().without({"label"}), Condition())
    assert cond.label.tolist() == [0, 1]
    with pytest.raises(ValueError, match="known cannot be dropped: use label or text"):
        cond.drop({"known"}, where)


def test_batches():
    cond = full()
    twice = cond.repeat(2)
    assert twice.label.tolist() == [0, 0, 1, 1]
    assert twice.text.shape == (4, 4, 5)
    same(cond.to("cpu"), cond)


def test_time_features():
    embed = TimeEmbedding(4, frequencies=2)
    with torch.no_grad():
        for layer in (embed.fc1, embed.fc2):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    t = 0.3
    angles = [1000 * t, 1000 * t * 10000**-0.5]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    torch.testing.assert_close(embed(torch.tensor([t]))[0], torch.nn.functional.silu(features), rtol=0, atol=2e-5)
    assert embed(torch.rand(2, 3)).shape == (2, 3, 4)


def test_time_of_half_precision_nets_is_computed_in_float32():
    embed = TimeEmbedding(8).bfloat16()
    close = embed(torch.tensor([0.998, 0.999]))  # the same number in bfloat16
    assert close.dtype == torch.bfloat16
    assert not torch.equal(close[0], close[1])


def test_null_label_is_the_last_row():
    embed = LabelEmbedding(3, 4)
    assert torch.equal(embed(torch.tensor([2, -1])), embed.weight[[2, 3]])


def test_a_masked_text_leaves_the_null_word():
    embed = TextEmbedding(5, 6)
    torch.nn.init.normal_(embed.null)
    words, mask = embed(2, torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.bool))
    assert words.shape == (2, 5, 6)
    assert mask.tolist() == [[True] + [False] * 4] * 2
    assert torch.equal(words[:, 0], embed.null.expand(2, 6))
    alone, none = embed(2, None, None)
    assert torch.equal(alone, words[:, :1])
    assert none is None
