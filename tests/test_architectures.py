"""Groups of random architectures: from which choices, in which space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from example_spaces import ALL, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.bit_widths import at_bits
from apq.errors import UserError
from apq.genes import canonical, check_genes, largest_subnet, subnets_of
from apq.layers import layers_of
from apq.presets import APQ_IMAGENET, DIGITS, OQA_MBV2_GLYPHS, OQA_MBV3, QFA_MBV3_GLYPHS
from report.architectures import DEEP_SLIM, RANDOM, SHALLOW_FAT, draw, in_space

# OQA, section 4.5: depths, kernel sizes and expansions of both groups.
PAPER = {
    SHALLOW_FAT: ({2, 3}, {5, 7}, {4, 6}),
    DEEP_SLIM: ({3, 4}, {3, 5}, {3, 4}),
    RANDOM: ({2, 3, 4}, {3, 5, 7}, {3, 4, 6}),
}


@pytest.mark.parametrize("group", PAPER, ids=lambda group: group.name)
def test_the_groups_of_the_paper(group):
    subnets = subnets_of(OQA_MBV3, draw(OQA_MBV3, group, 300, 0))
    depths, kernels, expansions = PAPER[group]
    running = [(net, slot.index) for net in subnets for slot in net.running_slots(OQA_MBV3)]
    assert {depth for net in subnets for depth in net.d} == depths
    assert {net.ks[i] for net, i in running} == kernels
    assert {net.e[i] for net, i in running} == expansions
    assert {net.resolution for net in subnets} == {*range(128, 225, 4)}


def test_small_spaces_have_them_by_rank():
    subnets = subnets_of(OQA_MBV2_GLYPHS, draw(OQA_MBV2_GLYPHS, SHALLOW_FAT, 100, 0))
    assert {depth for net in subnets for depth in net.d} == {1, 2}
    words = "shallow-fat: depths 1, 2; kernels 5, 7; expansions 4, 6"
    assert SHALLOW_FAT.words(OQA_MBV2_GLYPHS) == words
    assert DEEP_SLIM.words(OQA_MBV2_GLYPHS) == "deep-slim: depths 2, 3; kernels 3, 5; expansions 3, 4"
    assert DEEP_SLIM.words(OQA_MBV3) == "deep-slim: depths 3, 4; kernels 3, 5; expansions 3, 4"
    assert (
        SHALLOW_FAT.words(APQ_IMAGENET) == "shallow-fat: depths 2, 3 or 1; kernels 5, 7; upper part of the mid channels"
    )
    assert DEEP_SLIM.words(DIGITS) == "deep-slim: depths 2, 3 or 2; kernels 3, 5; lower part of the mid channels"


@given(name=st.sampled_from(sorted(ALL)), group=st.sampled_from([*PAPER]), seed=st.integers(0, 99), n=st.integers(1, 9))
def test_drawn_architectures_are_legal_and_do_not_depend_on_their_number(name, group, seed, n):
    space = ALL[name]
    genes = draw(space, group, n, seed)
    check_genes(space, genes)
    assert (genes == canonical(space, genes)).all()
    assert (draw(space, group, n + 5, seed)[:n] == genes).all()
    highest = largest_subnet(space).bits
    for subnet in subnets_of(space, genes):
        assert subnet.bits == highest


def test_groups_and_seeds_differ():
    drawn = [draw(OQA_MBV3, group, 2, seed).tobytes() for group in PAPER for seed in (0, 1)]
    assert len(set(drawn)) == 6


@settings(max_examples=20)
@given(seed=st.integers(0, 99), bits=st.integers(2, 8))
def test_an_architecture_is_the_same_at_other_bits(seed, bits):
    space, other = QFA_MBV3_GLYPHS, at_bits(QFA_MBV3_GLYPHS, bits)
    genes = draw(space, RANDOM, 3, seed)
    moved = in_space(genes, space, other)
    assert (in_space(moved, other, space) == genes).all()
    for one, two in zip(subnets_of(space, genes), subnets_of(other, moved), strict=True):
        layers = [
            [replace(layer, w_bits=0, a_bits=0) for layer in layers_of(*of)]
            for of in ((QFA_MBV3_GLYPHS, one), (other, two))
        ]
        assert layers[0] == layers[1]
        assert {layer.w_bits for layer in layers_of(other, two)} == {bits, 32}


def test_kernels_that_are_forbidden_at_the_highest_bits_are_told():
    rule = replace(TINY.forbidden[0], bits=8)
    with pytest.raises(UserError, match="forbid kernels at its highest bits"):
        draw(replace(TINY, name="odd", forbidden=(rule,)), RANDOM, 50, 0)
    assert np.unique(draw(TINY, RANDOM, 50, 0), axis=0).shape[0] > 10
