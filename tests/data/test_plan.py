"""The plan of a run: disjoint and complete over ranks, and a pure function of its arguments."""

from itertools import product

import pytest

from praxino.data.plan import BatchPlan, permutation


@pytest.mark.parametrize(
    ("length", "world", "batch", "full"),
    list(product((1, 2, 7, 13, 16, 31), (1, 2, 3, 4), (1, 4), (True, False))),
)
def test_ranks_are_disjoint_and_complete(length, world, batch, full):
    plans = [BatchPlan(length, batch, seed=3, rank=r, world=world, full=full) for r in range(world)]
    keys = [key for plan in plans for key in plan.keys(5)]
    assert len(set(keys)) == len(keys)  # disjoint, fillers included
    first = [index for _, index in keys if index < length]
    assert sorted(first) == list(range(length))  # every clip exactly once
    assert {index % length for _, index in keys} == set(range(length))
    shapes = [[len(b) for b in plan.batches(5)] for plan in plans]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0]) == len(plans[0])
    if full:
        assert set(shapes[0]) == {batch}
        assert len(keys) - length < world * batch
    else:
        assert len(keys) - length < world


def test_epochs_seeds_and_ranks_change_the_order():
    order = BatchPlan(50, 4, seed=0).keys(0)
    assert order == BatchPlan(50, 4, seed=0).keys(0)
    assert order != BatchPlan(50, 4, seed=1).keys(0)
    assert [i for _, i in order] != [i for _, i in BatchPlan(50, 4, seed=0).keys(1)]
    assert order != [(0, i) for i in range(len(order))]


def test_ranks_share_one_permutation():
    whole = BatchPlan(12, 1, seed=7).keys(2)
    for rank in range(3):
        assert BatchPlan(12, 1, seed=7, rank=rank, world=3).keys(2) == whole[rank::3]
    assert [i for _, i in whole] == permutation(12, 7, 2).tolist()


def test_batches_start_anywhere():
    plan = BatchPlan(23, 4, seed=1)
    batches = list(plan.batches(3))
    for start in range(len(plan) + 1):
        assert list(plan.batches(3, start)) == batches[start:]


def test_without_shuffle_the_order_is_that_of_the_clips():
    assert BatchPlan(5, 2, shuffle=False, full=False).keys(9) == [(9, i) for i in range(5)]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="0 clips"):
        BatchPlan(0, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchPlan(8, 4, rank=2, world=2)
