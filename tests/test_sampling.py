"""The subnets of a training step: what varies, the ends of the sandwich, resolutions, operands in full precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from apq.errors import UserError
from apq.genes import genes_of, largest_subnet, smallest_subnet, subnets_of
from apq.presets import DIGITS, OQA_MBV2_GLYPHS, QFA_MBV3_GLYPHS
from apq.space import FULL_PRECISION
from elastic_nn.modules.quant_layers import quantized_layers, quantizers
from elastic_nn.networks import DynamicProxylessNASNets, DynamicQuantizedProxylessNASNets
from elastic_nn.quantizers import BATCHQUANT
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.sampling import draw_subnets, float_operands, sample_phase, with_one_kernel_and_bits

SPACE = replace(QFA_MBV3_GLYPHS, resolutions=(24, 28, 32))
FIRST, LAST = RECIPES["tiny-qfa"].phases


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DynamicQuantizedProxylessNASNets(space=SPACE, scheme=BATCHQUANT)


def test_phases_with_less_reach_draw_the_largest_choices():
    subnets = sample_phase(DIGITS, ("ks", "d"), 200, np.random.default_rng(0), reach=0.6)
    assert {net.d[0] for net in subnets} == {2, 3}
    assert {net.d[2] for net in subnets} == {1, 2}
    assert {k for net in subnets for k in net.ks} == {3, 5, 7}


@pytest.mark.parametrize("elastic", [(), ("ks",), ("ks", "d"), ("ks", "d", "e")])
def test_phases_vary_only_what_is_elastic(elastic):
    largest = largest_subnet(DIGITS)
    subnets = sample_phase(DIGITS, elastic, 200, np.random.default_rng(0))
    assert all(net.bits == largest.bits for net in subnets)
    active = [[slot.index for slot in net.running_slots(DIGITS)] for net in subnets]
    vary = {
        "d": any(net.d != largest.d for net in subnets),
        "ks": any(net.ks[i] != largest.ks[i] for net, on in zip(subnets, active, strict=True) for i in on),
        "e": any(net.e[i] != largest.e[i] for net, on in zip(subnets, active, strict=True) for i in on),
    }
    assert vary == {part: part in elastic for part in vary}


def test_random_subnets_of_a_phase_have_random_bits_everywhere():
    drawn = sample_phase(SPACE, ("ks", "d", "e", "bits"), 300, np.random.default_rng(0))
    of_first_slot = np.array([[row[0] for row in subnet.bits] for subnet in drawn])  # it always runs
    for bits in (of_first_slot, np.array([subnet.shared_bits for subnet in drawn])):
        shares = np.stack([(bits == b).mean(axis=0) for b in (2, 3, 4)])
        assert (abs(shares - 1 / 3) < 0.12).all()
    assert {subnet.bits for subnet in sample_phase(SPACE, ("ks",), 5, np.random.default_rng(0))} == {
        largest_subnet(SPACE).bits
    }


def bits_after(net, call):
    """The bits of every operand that runs, but the classifier's."""
    call()
    parts = [net.blocks[i] for i in net.active_blocks] + [net.feature_mix_layer, net.pooled_mix_layer]
    return [operand.bits for part in parts for operand in quantizers(part)]


def test_the_ends_of_qfas_sandwich_have_one_kernel_and_one_bit_width(net):
    seen = {"largest": set(), "smallest": set()}
    for seed in range(60):
        for end, call in zip(seen, draw_subnets(net, LAST, np.random.default_rng(seed)), strict=False):
            (bits,) = set(bits_after(net, call))
            subnet = net.active
            kernels = {subnet.ks[slot.index] for slot in subnet.running_slots(SPACE)}
            seen[end].add((*kernels, bits))
            like = {"largest": largest_subnet, "smallest": smallest_subnet}[end](SPACE)
            assert (subnet.d, subnet.resolution) == (like.d, like.resolution)
            running = [slot.index for slot in subnet.running_slots(SPACE)]
            assert [subnet.e[i] for i in running] == [like.e[i] for i in running]
            assert subnets_of(SPACE, genes_of(SPACE, [subnet]))[0] == subnet  # canonical
            assert {layer.weight_quant.bits for layer in [net.classifier]} == {8}
    every = {(kernel, bits) for kernel in (3, 5, 7) for bits in (2, 3, 4)}
    assert seen == {"largest": every, "smallest": every}


def test_one_kernel_and_bits_obey_the_rules_of_a_space():
    rng = np.random.default_rng(0)
    drawn = [with_one_kernel_and_bits(DIGITS, largest_subnet(DIGITS), rng) for _ in range(80)]
    pairs = {(subnet.ks[0], subnet.bits[0][0]) for subnet in drawn}
    assert pairs == {(k, b) for k in (3, 5, 7) for b in (4, 6, 8)} - {(7, 4)}
    kinds = tuple(replace(kind, choices=(i + 2,)) for i, kind in enumerate(DIGITS.operands))
    odd = replace(DIGITS, name="odd", operands=kinds, forbidden=())
    with pytest.raises(UserError, match="no bit-width for all operands"):
        with_one_kernel_and_bits(odd, largest_subnet(odd), np.random.default_rng(0))


def test_each_subnet_of_a_sandwich_has_its_own_resolution(net):
    seen = []
    for seed in range(40):
        largest, smallest, *drawn = (call() for call in draw_subnets(net, LAST, np.random.default_rng(seed)))
        assert (largest, smallest) == (32, 24)
        seen += drawn
    shares = [np.mean(np.array(seen) == side) for side in (24, 28, 32)]
    assert max(abs(share - 1 / 3) for share in shares) < 0.12
    whole_batches = replace(LAST, own_resolutions=False)
    assert {call() for call in draw_subnets(net, whole_batches, np.random.default_rng(0))} == {None}


def test_the_largest_phase_of_oqa_is_at_the_largest_resolution():
    alone = DynamicProxylessNASNets(space=OQA_MBV2_GLYPHS)
    rng = np.random.default_rng(0)

    def sides(recipe):
        return {call() for _ in range(40) for call in draw_subnets(alone, RECIPES[recipe].phases[0], rng)}

    assert sides("oqa-glyphs") == {32}
    assert sides("oqa-glyphs-float") == {24, 28, 32}  # once-for-all's is trained at all resolutions


def test_a_step_of_the_first_stage_mixes_full_precision_in(net):
    ends = {"largest": [], "smallest": []}
    for seed in range(80):
        largest, smallest, *drawn = draw_subnets(net, FIRST, np.random.default_rng(seed))
        for end, call in zip(ends, (largest, smallest), strict=True):
            (bits,) = set(bits_after(net, call))  # all operands have it
            ends[end].append(bits)
            classifier = {net.classifier.weight_quant.bits, net.classifier.act_quant.bits}
            assert classifier == {bits if bits == FULL_PRECISION else 8}
    for found in ends.values():  # full precision is one of four
        assert set(found) == {2, 3, 4, FULL_PRECISION}
        assert 0.1 < np.mean(np.array(found) == FULL_PRECISION) < 0.4
    assert len(drawn) == 4
    found = [bits_after(net, call) for call in drawn]
    assert found == [bits_after(net, call) for call in drawn]  # a call draws nothing: all processes run the same
    assert len({tuple(row) for row in found}) == 4
    for call in draw_subnets(net, LAST, np.random.default_rng(0)):
        assert FULL_PRECISION not in bits_after(net, call)


def test_full_precision_is_coupled_within_a_layer(net):
    """Each of two operands is float with probability 1/4; where only one is, both become so with 0.2, or neither.

    Both are float with 1/16 + 3/8 x 0.2; in the classifier, where two of three become so, with 1/16 + 3/8 x 2/3.
    """
    rng, draws = np.random.default_rng(0), 600
    layers = {name: list(layer.operands().values()) for name, layer in quantized_layers(net).items()}
    of_layer = {operand: name for name, operands in layers.items() for operand in operands}
    counts = dict.fromkeys(layers, 0)
    for _ in range(draws):
        chosen = [of_layer[operand] for operand in float_operands(net, 1 / 4, rng)]
        for name in set(chosen):
            assert chosen.count(name) == len(layers[name])  # never one operand alone
            counts[name] += 1
    classifier = counts.pop("classifier")
    others = [count for name, count in counts.items() if layers[name]]
    assert np.sum(others) / (draws * len(others)) == pytest.approx(1 / 16 + 3 / 8 * 0.2, abs=0.01)
    assert classifier / draws == pytest.approx(1 / 16 + 3 / 8 * 2 / 3, abs=0.06)


def test_phases_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="float_share needs random_ends"):
        replace(FIRST, random_ends=False)
    with pytest.raises(UserError, match="random_ends needs sandwich"):
        replace(LAST, sandwich=False)
