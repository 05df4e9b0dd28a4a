from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from example_spaces import ALL, TINY, every_row

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.layers import layers_of, searchable_layers
from apq.presets import APQ_IMAGENET, SPACES, get_space
from apq.space import LATER_FIELDS, space_from_dict, space_to_dict
from apq.stages import Stage, make_divisible

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


def test_size_counts_what_brute_force_finds():
    assert TINY.size() == len(every_row(TINY)) == 2 * (12 + 12**2) * 12


def test_size_of_apq_imagenet_by_hand():
    blocks = 3**5 - 3**3  # kernel and four bit-widths, less the 7x7 kernels with 4-bit depthwise activations
    total = 1
    inputs = [16, *[24] * 4, *[40] * 4, *[80] * 4, *[96] * 4, *[192] * 4]
    widths = [2 * c // 8 + 1 for c in inputs]  # 4c, 4c + 8, ..., 6c
    assert widths[0] == 5
    assert widths[-1] == 49
    for start in range(0, 20, 4):
        options = [blocks * n for n in widths[start : start + 4]]
        total *= sum(math.prod(options[:depth]) for depth in (2, 3, 4))
    assert APQ_IMAGENET.size() == total * blocks * widths[20]


def test_apq_imagenet_has_the_published_table_rows():
    layers = searchable_layers(APQ_IMAGENET)
    assert len(layers) == len(set(layers)) == 6567
    assert not [layer for layer in layers if layer.kernel_size == 7 and layer.a_bits == 4]


def test_apq_imagenet_stages_and_sides():
    assert [slot.stage for slot in APQ_IMAGENET.slots] == [i // 4 for i in range(21)]
    assert APQ_IMAGENET.input_sides(224) == (112, *[56] * 4, *[28] * 4, *[14] * 8, *[7] * 4, 7)[:22]


@spaces
def test_searchable_layers_cover_what_subnets_run(space):
    known = set(searchable_layers(space))
    for net in subnets_of(space, sample(space, 20, np.random.default_rng(0))):
        assert {
            layer for layer in layers_of(space, net) if layer.name.count(".") >= 2 and "blocks.0" not in layer.name
        } <= known


@spaces
def test_spaces_survive_json(space):
    again = space_from_dict(space_to_dict(space))
    assert again == space
    assert hash(again) == hash(space)
    assert again.size() == space.size()


@spaces
def test_layers_chain(space):
    for net in subnets_of(space, sample(space, 20, np.random.default_rng(1))):
        layers = layers_of(space, net)
        for before, after in itertools.pairwise(layers):
            assert before.out_channels == after.in_channels
        for before, after in itertools.pairwise(layer for layer in layers if ".squeeze." not in layer.name):
            pooled = after.name in ("pooled_mix_layer", "classifier")
            assert after.input_size == (1 if pooled else before.output_size)
        assert layers[-1].out_channels == space.n_classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_sizes": (3, 4)}, "odd"),
        ({"kernel_sizes": (5, 3)}, "ascending"),
        ({"ratios": ()}, "ascending"),
        ({"stages": ()}, "no stages"),
        ({"operands": TINY.operands[:1]}, "not by one kind"),
        ({"budget_scope": "half"}, "half"),
        ({"n_classes": 0}, "at least 1"),
        ({"end_bits": 0}, "at least 1"),
        ({"pooled_width": 0.5}, "whole"),
        ({"end_activation": "swish"}, "known: relu6, relu, h_swish"),
    ],
)
def test_impossible_spaces_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_depths_ascend():
    with pytest.raises(UserError, match="ascending"):
        Stage(width=8, stride=1, depths=(2, 1))


def test_stages_know_their_activations():
    with pytest.raises(UserError, match="known: relu6"):
        Stage(width=8, stride=1, depths=(1,), activation="tanh")
    with pytest.raises(UserError, match="true or false"):
        Stage(width=8, stride=1, depths=(1,), squeeze="no")


def test_older_files_say_the_same_of_a_space():
    plain = space_to_dict(TINY)
    assert not {*plain, *plain["stages"][0]} & set(LATER_FIELDS)
    changed = dataclasses.replace(TINY, fixed_bits=4, pooled_width=24)
    assert {*space_to_dict(changed)} - {*plain} == {"fixed_bits", "pooled_width"}
    assert space_from_dict(space_to_dict(changed)) == changed


def test_space_from_dict_complains():
    with pytest.raises(UserError, match="not a search space"):
        space_from_dict({"name": "x"})
    with pytest.raises(UserError, match="not a search space: it has unknown colour, shared_operands"):
        space_from_dict({**space_to_dict(TINY), "colour": "red", "shared_operands": []})


def test_get_space_names_the_known_ones():
    assert all(get_space(name) is space for name, space in SPACES.items())
    with pytest.raises(UserError, match="apq-imagenet"):
        get_space("imagenot")


def test_make_divisible_rule():
    for v in np.linspace(0.5, 1500, 4001):
        rounded = max(8, 8 * math.floor(int(v + 4) / 8))
        assert make_divisible(v) == (rounded + 8 if rounded < 0.9 * v else rounded)
