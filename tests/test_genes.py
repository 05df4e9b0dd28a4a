from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from example_spaces import ALL, TINY, WIDE, every_row
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import (
    active,
    canonical,
    cardinalities,
    chosen,
    forbidden_slots,
    gene_type,
    genes_of,
    legalise,
    sample,
    subnets_of,
    view,
)
from apq.operands import Forbidden

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
seeds = given(seed=st.integers(0, 2**32 - 1))


@spaces
@seeds
@settings(max_examples=20)
def test_samples_are_legal_canonical_and_in_range(space, seed):
    genes = sample(space, 20, np.random.default_rng(seed))
    assert genes.shape == (20, len(cardinalities(space)))
    assert (genes >= 0).all()
    assert (genes < cardinalities(space)).all()
    assert not forbidden_slots(space, genes).any()
    assert (canonical(space, genes) == genes).all()


@spaces
@seeds
@settings(max_examples=20)
def test_genes_and_subnets_are_two_forms_of_one_thing(space, seed):
    genes = sample(space, 5, np.random.default_rng(seed))
    subnets = subnets_of(space, genes)
    assert (genes_of(space, subnets) == genes).all()
    assert subnets_of(space, genes_of(space, subnets)) == subnets


@spaces
def test_matrices_and_subnets_agree_on_what_runs_and_how_wide_it_is(space):
    genes = sample(space, 20, np.random.default_rng(0))
    runs, widths = active(space, genes), view(space, genes).e
    for i, net in enumerate(subnets_of(space, genes)):
        running = net.running_slots(space)
        assert [slot.index for slot in running] == np.nonzero(runs[i])[0].tolist()
        assert len(running) == sum(net.d)
        assert all(net.mid_channels(slot) == slot.mid_channels[widths[i, slot.index]] for slot in running)


@given(data=st.data(), dtype=st.sampled_from([np.int8, np.int16, np.int32, np.int64]))
def test_chosen_is_where(data, dtype):
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(1, 5)))
    info, draw = np.iinfo(dtype), np.random.default_rng(data.draw(st.integers(0, 1000)))
    one, other = draw.integers(info.min, info.max, size=(2, *shape), dtype=dtype, endpoint=True)
    take = draw.random(shape) < 0.5
    found = chosen(take, one, other)
    assert found.dtype == dtype
    assert np.array_equal(found, np.where(take, one, other))


@spaces
def test_genes_are_small_and_hold_every_choice(space):
    most, genes = cardinalities(space).max(), sample(space, 10, np.random.default_rng(0))
    assert genes.dtype == gene_type(space) == (np.int8 if most <= 128 else np.int16)
    assert np.iinfo(genes.dtype).max >= most - 1
    every = dataclasses.replace(WIDE, name="channels", channel_step=1)  # 121 choices of 40 channels, and more
    assert gene_type(dataclasses.replace(every, ratios=(1.0, 8.0))) == np.int16


@spaces
def test_same_seed_same_sample(space):
    first, again, other = (sample(space, 50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@spaces
def test_a_sample_meets_every_choice(space):
    genes = sample(space, 3000, np.random.default_rng(0))
    for column, n_choices in enumerate(cardinalities(space)):
        assert set(genes[:, column]) == set(range(n_choices))


@spaces
def test_what_an_idle_slot_says_never_matters(space):
    rng = np.random.default_rng(3)
    genes = sample(space, 50, rng)
    noise = rng.integers(cardinalities(space), size=genes.shape)
    idle = np.tile(~active(space, genes), 2 + len(space.operands))
    noisy = genes.copy()
    noisy[:, : idle.shape[1]] = np.where(idle, noise[:, : idle.shape[1]], genes[:, : idle.shape[1]])
    assert (canonical(space, noisy) == genes).all()
    assert subnets_of(space, noisy) == subnets_of(space, genes)


@spaces
def test_view_writes_through(space):
    genes = sample(space, 2, np.random.default_rng(0))
    parts = view(space, genes)
    parts.bits[:] = parts.ks[:] = parts.e[:] = parts.d[:] = parts.shared_bits[:] = parts.resolution[:] = 0
    assert not genes.any()


@spaces
def test_legalise_mends_forbidden_slots_and_leaves_the_rest(space):
    rng = np.random.default_rng(0)
    genes = canonical(space, rng.integers(cardinalities(space), size=(200, len(cardinalities(space)))))
    broken = forbidden_slots(space, genes)
    assert broken.any() == bool(space.forbidden)
    legal = legalise(space, genes, rng)
    assert not forbidden_slots(space, legal).any()
    changed = (legal != genes)[:, : (2 + len(space.operands)) * broken.shape[1]]
    assert not (changed.reshape(len(genes), -1, broken.shape[1]).any(axis=1) & ~broken).any()


def test_a_space_whose_rules_forbid_all_is_an_error():
    rules = tuple(Forbidden(kernel_size=k, operand="a", bits=b, reason="all of them") for k in (3, 5) for b in (4, 8))
    with pytest.raises(UserError, match="no legal block"):
        sample(dataclasses.replace(TINY, name="hopeless", forbidden=rules), 3, np.random.default_rng(0))


def test_every_row_of_a_tiny_space_is_sampled():
    drawn = sample(TINY, 60_000, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) > 0.99 * len(every_row(TINY))
