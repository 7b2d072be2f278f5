"""The order of samples: what must hold for any data and any sizes."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from sqllava.data.dataset import SampleKey
from sqllava.data.sampler import GroupedSampler


@st.composite
def samplers(draw):
    count = draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    share = draw(st.sampled_from([0.0, 0.02, 0.4, 0.9, 1.0]))
    micro = draw(st.integers(1, 4))
    return GroupedSampler(
        lengths=rng.integers(1, 2048, count).astype(np.int32),
        has_image=draw(st.sampled_from([rng.random(count) < share, None])),
        batch_size=micro,
        global_batch_size=micro * draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 5)),
        group_by_length=draw(st.booleans()),
        group_by_modality=draw(st.booleans()),
    )


def order(sampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert all(key.epoch == epoch for key in keys)
    return [key.index for key in keys]


def chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@settings(deadline=None)
@given(samplers(), st.integers(0, 3))
def test_every_record_comes_once(sampler, epoch):
    assert sorted(order(sampler, epoch)) == list(range(len(sampler)))


@settings(deadline=None)
@given(samplers(), st.integers(0, 3))
def test_the_order_is_a_function_of_seed_and_epoch(sampler, epoch):
    first = order(sampler, epoch)
    order(sampler, epoch + 1)
    assert order(sampler, epoch) == first


@settings(deadline=None)
@given(samplers(), st.integers(0, 3))
def test_at_most_one_step_is_mixed(sampler, epoch):
    steps = chunks(order(sampler, epoch), sampler.global_batch_size)
    mixed = [step for step in steps if len({bool(sampler.has_image[i]) for i in step}) > 1]
    assert len(mixed) <= 1 or not sampler.group_by_modality


@settings(deadline=None)
@given(samplers(), st.integers(0, 3))
def test_the_first_step_has_images_if_any_whole_step_has(sampler, epoch):
    steps = chunks(order(sampler, epoch), sampler.global_batch_size)
    whole = [step for step in steps if len(step) == sampler.global_batch_size]
    if any(sampler.has_image[step].any() for step in whole):
        assert sampler.has_image[steps[0]].any()


@settings(deadline=None)
@given(samplers(), st.integers(0, 3))
def test_within_a_step_the_longest_come_first(sampler, epoch):
    if not sampler.group_by_length:
        return
    for step in chunks(order(sampler, epoch), sampler.global_batch_size):
        if len(set(sampler.has_image[step])) == 1 or not sampler.group_by_modality:
            lengths = sampler.lengths[step].tolist()
            assert lengths == sorted(lengths, reverse=True)


def dealt(sampler, batch_size: int, processes: int) -> list[set[int]]:
    """The records of each optimiser step, as accelerate deals the micro-batches out to ranks."""
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    accumulation = sampler.global_batch_size // batch_size // processes
    steps = range(0, len(shards[0]), accumulation)
    return [
        {key.index for shard in shards for batch in shard[s : s + accumulation] for key in batch}
        for s in steps
    ]


def test_a_step_holds_the_same_records_however_it_is_dealt():
    rng = np.random.default_rng(0)
    lengths, has_image = rng.integers(1, 2048, 200), rng.random(200) < 0.6

    def sampler(batch_size):
        return GroupedSampler(lengths, has_image, batch_size, 8, seed=3)

    steps = dealt(sampler(8), 8, 1)
    assert steps[:24] == dealt(sampler(1), 1, 1)[:24] == dealt(sampler(2), 2, 2)[:24]
    assert steps[:24] == dealt(sampler(1), 1, 4)[:24]


def test_lengths_in_a_step_are_alike():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2048, 20_000).astype(np.int32)
    spread = {}
    for grouped in (False, True):
        sampler = GroupedSampler(lengths, None, 8, 32, group_by_length=grouped)
        steps = chunks(order(sampler), 32)
        spread[grouped] = np.mean([np.ptp(lengths[step]) for step in steps])
    assert spread[True] < spread[False] / 15


def test_the_longest_image_step_comes_first():
    lengths = np.arange(1000, dtype=np.int32)
    has_image = lengths < 600
    assert 599 in order(GroupedSampler(lengths, has_image, 2, 8))[:8] or (
        # unless that record is among the leftovers
        599 in order(GroupedSampler(lengths, has_image, 2, 8))[-8:]
    )


def test_epochs_and_seeds_differ_and_mix_their_company():
    lengths = np.random.default_rng(0).integers(1, 2048, 640).astype(np.int32)
    sampler, other = (GroupedSampler(lengths, None, 4, 16, seed=seed) for seed in (0, 1))
    steps = [{frozenset(s) for s in chunks(order(sampler, epoch), 16)} for epoch in (0, 1)]
    assert not steps[0] & steps[1]
    assert order(sampler) != order(other)


def test_keys_carry_their_epoch():
    sampler = GroupedSampler(np.ones(3, dtype=np.int32), None, 1, 1)
    sampler.set_epoch(4)
    assert next(iter(sampler)).epoch == 4 and isinstance(next(iter(sampler)), SampleKey)
    assert len(sampler) == 3


@pytest.mark.parametrize(
    ("lengths", "has_image", "batch", "whole"),
    [(3, 3, 2, 3), (3, 3, 0, 4), (3, 2, 1, 2), (0, 0, 1, 1)],
)
def test_wrong_sizes_are_refused(lengths, has_image, batch, whole):
    with pytest.raises(ValueError, match=r"found|multiple"):
        GroupedSampler(np.ones(lengths), np.ones(has_image, dtype=bool), batch, whole)
