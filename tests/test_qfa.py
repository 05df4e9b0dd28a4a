"""QFA's space, and its published genes, features and FLOPs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from example_results import write_found

from apq.__main__ import main as show_space
from apq.bit_widths import at_bits, bits_throughout
from apq.errors import UserError
from apq.files import write_json
from apq.genes import cardinalities, genes_of, sample, subnets_of, view
from apq.layers import layers_of
from apq.operands import SharedOperand
from apq.presets import DIGITS, OQA_MBV3, QFA_MBV3, QFA_MBV3_GLYPHS, get_space
from apq.space import FULL_PRECISION, space_to_dict
from apq.subnet import policy_of, spec_of, subnet_from_spec
from elastic_nn.training.recipes import get_recipe
from methods.nsga2.front_finder import Nsga2Config
from utils.converter import Converter
from utils.qfa import genes_of_published, published_flops, published_of_genes
from utils.qfa import main as show_published

twins = pytest.mark.parametrize("space", [QFA_MBV3, QFA_MBV3_GLYPHS], ids=lambda s: s.name)


def published_row(row):
    return [*row["ks"], *row["e"], *row["d"], row["r"], *row["bits"]]


def test_published_features(golden):
    rows = golden("qfa_onehot.json")["rows"]
    genes = genes_of_published(QFA_MBV3, np.array([row["gene"] for row in rows]))
    for row, features in zip(rows, Converter(QFA_MBV3).encode(genes), strict=True):
        assert features.dtype == np.float32
        assert features.shape == (row["dim"],) == (555,)
        assert np.flatnonzero(features).tolist() == row["ones"]
        assert set(features) == {0, 1}


def test_published_flops(golden):
    rows = golden("qfa_flops.json")["rows"]
    published = np.array([published_row(row) for row in rows])
    assert published_flops(published) / 1e6 == pytest.approx([row["flops_M_8bit_equivalent"] for row in rows], rel=1e-9)
    assert published_flops(published) * 64 / 1e9 == pytest.approx([row["bitops_G"] for row in rows], rel=1e-9)
    for bits in (8, 4, 2):
        published[:, -130:] = bits
        found = published_flops(published) / 1e6
        assert found == pytest.approx([row[f"flops_M_all_{bits}bit"] for row in rows], rel=1e-9)
    at_8 = published_flops(published * 0 + np.where(np.arange(176) < 46, published, 8))
    published[:, -130:] = 16
    assert (published_flops(published) == at_8).all()  # bits above 8 count as 8


def test_true_macs_are_not_the_published_ones(golden):
    row = golden("qfa_flops.json")["rows"][0]
    genes = genes_of_published(QFA_MBV3, np.array([published_row(row)]))
    (subnet,) = subnets_of(QFA_MBV3, genes)
    true = sum(layer.macs for layer in layers_of(QFA_MBV3, subnet)) / 1e6
    assert 0.9 < true / row["flops_M_all_8bit"] < 1.2
    assert true != pytest.approx(row["flops_M_all_8bit"], rel=1e-2)


@twins
def test_published_genes_round_trip(space):
    genes = sample(space, 50, np.random.default_rng(0))
    published = published_of_genes(space, genes)
    assert (genes_of_published(space, published) == genes).all()
    if space is QFA_MBV3:
        assert published.shape[1] == 176
    for bad in (published[:, 1:], published * 0 + 1, published[0]):
        with pytest.raises(UserError, match="published gene"):
            genes_of_published(space, bad)


def test_other_spaces_have_no_such_form():
    for space in (DIGITS, OQA_MBV3):
        with pytest.raises(UserError, match=f"{space.name} does not choose the bits"):
            published_of_genes(space, sample(space, 1, np.random.default_rng(0)))


def test_the_space_is_as_published():
    space = get_space("qfa-mbv3")
    blocks = 3 * 3 * 3**6
    by_hand = 25 * 3**8 * (blocks**2 + blocks**3 + blocks**4) ** 5
    assert space.size() == by_hand > 10**76
    bits = len(space.operands) * len(space.slots) + len(space.shared_operands) + 2
    assert bits == 130
    rounded = [space.stem_width, *(stage.width for stage in space.stages), space.head_width, space.pooled_width]
    assert rounded == [24, 32, 48, 96, 136, 192, 1152, 1536]
    assert all(slot.ratios == (3.0, 4.0, 6.0) for slot in space.slots)


@twins
def test_every_convolution_has_bits_of_its_own(space):
    genes = sample(space, 1, np.random.default_rng(0))
    row, counts = genes[0], cardinalities(space)
    (subnet,) = subnets_of(space, genes)

    def bits(net):
        return {layer.name: (layer.w_bits, layer.a_bits) for layer in layers_of(space, net)}

    before = bits(subnet)
    ends = {name for name, pair in before.items() if pair == (FULL_PRECISION, FULL_PRECISION)}
    assert {name for name in ends if "squeeze" not in name} == {"first_conv"}
    assert before["classifier"] == (8, 8)  # as the published code raises it
    n_fixed, moved = len(space.shared_operands), {}
    for column in range(len(row) - 1 - n_fixed, len(row) - 1):
        other = row.copy()
        other[column] = (other[column] + 1) % counts[column]
        after = bits(subnets_of(space, other[None])[0])
        (name,) = (name for name in before if before[name] != after[name])
        moved.setdefault(name, []).append([a != b for a, b in zip(before[name], after[name], strict=True)])
    assert moved == {f.layer: [[True, False], [False, True]] for f in space.shared_operands}


@twins
def test_specs_say_the_shared_bits(space):
    genes = sample(space, 5, np.random.default_rng(2))
    for net in subnets_of(space, genes):
        parts = spec_of(space, net)
        assert parts["policy"]["fixed_bits_setting"] == list(net.shared_bits)
        spec = {**parts["arch"], **parts["policy"]}
        assert subnet_from_spec(space, {**spec, "resolution": net.resolution}) == net
        with pytest.raises(UserError, match=r"fixed_bits_setting\[1\] is 5; allowed: 2, 3, 4"):
            subnet_from_spec(space, {**spec, "fixed_bits_setting": [2, 5, *net.shared_bits[2:]]})
        with pytest.raises(UserError, match="lacks fixed_bits_setting"):
            subnet_from_spec(space, {key: value for key, value in spec.items() if key != "fixed_bits_setting"})


def test_spaces_without_shared_operands_do_not_speak_of_them():
    (net,) = subnets_of(DIGITS, sample(DIGITS, 1, np.random.default_rng(0)))
    assert net.shared_bits == ()
    assert "fixed_bits_setting" not in policy_of(DIGITS, net)
    assert "fixed_operands" not in space_to_dict(DIGITS)
    assert view(DIGITS, genes_of(DIGITS, [net])).shared_bits.shape == (1, 0)


def test_the_converter_tells_shared_bits_apart():
    space, rng = QFA_MBV3_GLYPHS, np.random.default_rng(0)
    converter, genes = Converter(space), sample(space, 20, rng)
    assert (converter.decode(converter.encode(genes)) == genes).all()
    other = genes.copy()
    view(space, other).shared_bits[:, 0] = (view(space, other).shared_bits[:, 0] + 1) % 3
    assert (converter.encode(other) != converter.encode(genes)).sum(axis=1).tolist() == [2] * len(genes)


def test_one_bit_width_leaves_nothing_to_choose():
    assert bits_throughout(QFA_MBV3) is None
    space = at_bits(QFA_MBV3_GLYPHS, 2)
    assert bits_throughout(space) == 2
    assert space.shared_operands == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "classifier"}, "layers are"),
        ({"operand": "b"}, "operands"),
        ({"choices": (4, 2)}, "ascending"),
        ({"choices": (1, 2)}, "at least 2"),
    ],
)
def test_impossible_shared_operands_are_refused(change, message):
    good = {"layer": "feature_mix_layer", "operand": "w", "choices": (2, 4)}
    with pytest.raises(UserError, match=message):
        SharedOperand(**{**good, **change})
    twice = (SharedOperand(**good), SharedOperand(**good))
    with pytest.raises(UserError, match="distinct"):
        dataclasses.replace(DIGITS, shared_operands=twice)
    with pytest.raises(UserError, match="no pooled_mix_layer"):
        dataclasses.replace(DIGITS, shared_operands=(SharedOperand(**{**good, "layer": "pooled_mix_layer"}),))


def test_a_space_prints_its_exact_size(capsys):
    show_space(["qfa-mbv3", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["networks"] == QFA_MBV3.size() > 10**76
    assert facts["ends"]["largest"]["MACs, M"] > facts["ends"]["smallest"]["MACs, M"] > 0
    show_space(["qfa-mbv3"])
    assert f"{QFA_MBV3.size():,} networks" in capsys.readouterr().out


def test_published_figures_of_an_experiment_and_of_genes(tmp_path, capsys):
    genes = sample(QFA_MBV3, 3, np.random.default_rng(0))
    subnets = subnets_of(QFA_MBV3, genes)
    published = published_of_genes(QFA_MBV3, genes)
    write_json(tmp_path / "genes.json", published.tolist())
    show_published([str(tmp_path / "genes.json"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["genes"] == published.tolist()
    assert shown["published_flops"] == published_flops(published).tolist()
    assert shown["macs"] == [sum(layer.macs for layer in layers_of(QFA_MBV3, subnet)) for subnet in subnets]
    write_found(tmp_path / "e", QFA_MBV3, subnets[1])
    show_published([str(tmp_path / "e")])
    printed = capsys.readouterr().out
    assert " ".join(map(str, published[1])) in printed
    assert f"{published_flops(published)[1] / 1e6:.3f}" in printed
    write_json(tmp_path / "genes.json", [["a"]])
    with pytest.raises(UserError, match="must hold a list of lists"):
        show_published([str(tmp_path / "genes.json")])


def test_the_published_numbers_of_qfa():
    """BatchQuant (NeurIPS 2021): two stages, 2.5e-3 for every 64 images; NSGA-II: 500 subnets, 1,000 generations."""
    recipe = get_recipe(None, QFA_MBV3)
    assert [(phase.train.warmup_epochs, phase.train.epochs) for phase in recipe.phases] == [(5, 5 + 60), (5, 5 + 120)]
    assert [phase.float_share for phase in recipe.phases] == [1 / 4, 0]  # 32 beside 2, 3 and 4
    for phase in recipe.phases:
        assert (phase.train.warmup_lr, phase.train.batch_size) == (2.5e-3, 32 * 64)  # 32 GPUs
        assert (phase.train.clip_norm, phase.train.clip_together, phase.train.dropout) == (500, True, 0.1)
        assert (phase.train.momentum, phase.train.label_smoothing, phase.train.kd_ratio) == (0.9, 0.1, 1.0)
        assert phase.train.nesterov
        assert phase.train.schedule == "cosine"
        assert phase.random_ends
        assert phase.own_resolutions
        assert phase.teacher_follows
        assert phase.train.lr / phase.train.batch_size == pytest.approx(2.5e-3 / 64)
        assert phase.train.weight_decay == 3e-5
        assert phase.sandwich
        assert phase.subnets_per_step == 2 + 4
        assert phase.elastic == ("resolution", "ks", "d", "e", "bits")
    assert (recipe.pairs_quant, recipe.recalibration_images) == (16_000, 64 * 30)
    assert (recipe.predictor_hidden, Converter(QFA_MBV3).full_dim) == (600, 555)
    assert (Nsga2Config().population, Nsga2Config().generations) == (500, 1000)
    assert get_recipe(None, QFA_MBV3, in_float=True).name == "oqa-imagenet-float"
