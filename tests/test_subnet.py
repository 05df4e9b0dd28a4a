from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from example_spaces import ALL

from apq.errors import UserError
from apq.genes import sample, subnets_of
from apq.presets import APQ_IMAGENET, DIGITS
from apq.subnet import architecture_of, policy_of, subnet_from_spec
from utils.converter import Converter

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)


def spec_of(space, subnet):
    return {**architecture_of(space, subnet), **policy_of(space, subnet)}


@pytest.fixture
def spec():
    return Converter(APQ_IMAGENET, seed=0).random_spec()


@spaces
def test_a_spec_round_trips(space):
    for net in subnets_of(space, sample(space, 20, np.random.default_rng(0))):
        assert subnet_from_spec(space, spec_of(space, net)) == net
        assert len({net, subnet_from_spec(space, spec_of(space, net))}) == 1


def test_golden_specs_are_subnets(golden):
    for row in golden("apq_converter.json")["specs"]:
        net = subnet_from_spec(APQ_IMAGENET, row["spec"])
        assert subnet_from_spec(APQ_IMAGENET, spec_of(APQ_IMAGENET, net)) == net


def test_idle_slots_do_not_tell_networks_apart(spec):
    spec["d"][0] = 2
    other = {**spec, "ks": list(spec["ks"]), "pw_w_bits_setting": list(spec["pw_w_bits_setting"])}
    other["ks"][3], other["pw_w_bits_setting"][2] = 7, 4
    assert subnet_from_spec(APQ_IMAGENET, spec) == subnet_from_spec(APQ_IMAGENET, other)


def test_the_depth_of_a_single_block_stage_does_not_matter(spec):
    nets = {subnet_from_spec(APQ_IMAGENET, {**spec, "d": [*spec["d"][:5], depth]}) for depth in (1, 2, 3, 4)}
    assert len(nets) == 1


def test_ratios_go_to_the_nearest_width(spec):
    spec["e"][20] = 4.03
    assert subnet_from_spec(APQ_IMAGENET, spec).e[20] == 776 / 192


def without(key):
    return lambda spec: spec.pop(key)


def put(key, index, value):
    return lambda spec: spec[key].__setitem__(index, value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("ks"), "lacks ks"),
        (without("dw_a_bits_setting"), "lacks dw_a_bits_setting"),
        (lambda spec: spec.update(speed=3), "speed"),
        (lambda spec: spec.update(wid=1.3), "wid"),
        (lambda spec: spec.update(resolution=192), "resolution"),
        (lambda spec: spec["ks"].pop(), "ks must be a list of 21"),
        (lambda spec: spec.update(e=4), "e must be a list of 21"),
        (lambda spec: spec.update(d="22222"), "d must be a list"),
        (put("ks", 0, 4), r"ks\[0\] is 4"),
        (put("ks", 0, True), "not a number"),
        (put("e", 0, 6.6), r"e\[0\] is 6.6"),
        (put("e", 0, float("nan")), "not a number"),
        (put("d", 0, 5), r"d\[0\] is 5"),
        (put("pw_a_bits_setting", 0, 2), r"pw_a_bits_setting\[0\] is 2"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec, spoil, message):
    spoil(spec)
    with pytest.raises(UserError, match=message):
        subnet_from_spec(APQ_IMAGENET, spec)


def test_forbidden_blocks_are_refused_with_the_reason(spec):
    spec["ks"][0], spec["dw_a_bits_setting"][0] = 7, 4
    with pytest.raises(UserError, match=r"slot 0.*cost table"):
        subnet_from_spec(APQ_IMAGENET, spec)


def test_widths_that_are_no_multiples_of_8_read_back():
    stages = tuple(dataclasses.replace(stage, width=12) for stage in DIGITS.stages)
    space = dataclasses.replace(DIGITS, name="twelve", stages=stages)
    for subnet in subnets_of(space, sample(space, 20, np.random.default_rng(0))):
        assert subnet_from_spec(space, {**architecture_of(space, subnet), **policy_of(space, subnet)}) == subnet
