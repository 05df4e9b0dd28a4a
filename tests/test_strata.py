"""Pairs in strata: legality, frequencies, what each stratum fixes; through the script."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import script
from example_spaces import ALL, TINY, WIDE
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import elastic_nn.training.pairs
import methods.prepare.predictor
from apq.errors import UserError
from apq.files import read_json
from apq.genes import active, canonical, check_genes, forbidden_slots, sample, subnets_of, view
from apq.operands import SharedOperand
from apq.presets import APQ_IMAGENET, OQA_MBV2_GLYPHS, QFA_MBV3, QFA_MBV3_GLYPHS
from apq.strata import PairStrata, common_bits, draw_in_strata
from apq.subnet import spec_of, subnet_from_spec
from dataset import load_splits
from dataset.pairs import PairStore
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.quantizers import BATCHQUANT
from elastic_nn.training.inheritance import first_supernet
from elastic_nn.training.pairs import pair_subnet
from elastic_nn.training.recipe import OutlierRule
from elastic_nn.training.recipes import QFA_GLYPHS_RECIPE, QFA_IMAGENET_RECIPE, RECIPES, TINY_QFA_RECIPE
from methods.prepare.plan import with_pairs

search = script("search")
# With a shared operand, and bits that one kind does not offer.
UNEVEN = replace(
    WIDE,
    name="uneven",
    operands=tuple(replace(kind, choices=(2, 4) if kind.operand == "a" else (3, 4)) for kind in WIDE.operands),
    shared_operands=(SharedOperand(layer="feature_mix_layer", operand="w", choices=(2, 3, 4)),),
    forbidden=(),
)
APART = replace(
    TINY,
    name="apart",
    operands=tuple(replace(k, choices=(8,) if k.operand == "w" else (4,)) for k in TINY.operands),
    forbidden=(),
)
SOME = {**ALL, UNEVEN.name: UNEVEN, APART.name: APART}
ALWAYS = dict.fromkeys(("full_resolution", "full_depth", "one_bit_width"), 1.0)


@given(name=st.sampled_from(sorted(SOME)), seed=st.integers(0, 2**32), chance=st.floats(0, 1))
def test_rows_are_legal_and_in_their_strata(name, seed, chance):
    space, n = SOME[name], 6
    chances = dict.fromkeys(ALWAYS, chance)
    genes, drawn = draw_in_strata(space, n, PairStrata(**chances), np.random.default_rng(seed))
    check_genes(space, genes)
    assert (genes == canonical(space, genes)).all()
    assert not (forbidden_slots(space, genes) & active(space, genes)).any()
    for subnet, (resolution, depth, one) in zip(subnets_of(space, genes), drawn.tolist(), strict=True):
        spec = spec_of(space, subnet)
        assert subnet_from_spec(space, {**spec["arch"], **spec["policy"]}) == subnet
        assert not resolution or subnet.resolution == max(space.resolutions)
        assert not depth or subnet.d == tuple(max(stage.depths) for stage in space.stages)
        if one:
            running = [slot.index for slot in subnet.running_slots(space)]
            widths = {row[i] for row in subnet.bits for i in running} | set(subnet.shared_bits)
            assert len(widths) == 1


def test_common_bits_by_hand():
    assert common_bits(QFA_MBV3) == (2, 3, 4)
    assert common_bits(APQ_IMAGENET) == (4, 6, 8)
    assert common_bits(OQA_MBV2_GLYPHS) == (4,)
    assert common_bits(UNEVEN) == (4,)
    assert common_bits(APART) == ()
    every = tuple(replace(rule, kernel_size=k) for rule in TINY.forbidden for k in TINY.kernel_sizes)
    assert common_bits(replace(TINY, name="without 4", forbidden=every)) == (8,)


def test_frequencies_of_the_strata():
    n = 4000
    strata = PairStrata()
    assert (strata.full_resolution, strata.full_depth, strata.one_bit_width) == (0.4, 0.3, 0.3)
    genes, drawn = draw_in_strata(QFA_MBV3, n, strata, np.random.default_rng(7))
    parts = view(QFA_MBV3, genes)
    largest, deepest = (parts.resolution == 24), (parts.d == 2).all(axis=1)
    bits = np.concatenate([parts.bits.transpose(0, 2, 1).reshape(n, -1), parts.shared_bits], axis=1)
    running = np.repeat(active(QFA_MBV3, genes), 6, axis=1)
    running = np.concatenate([running, np.ones((n, parts.shared_bits.shape[1]), bool)], axis=1)
    first = parts.shared_bits[:, :1]
    one = ((bits == first) | ~running).all(axis=1)
    # Those in a stratum by chance too: 1 of 25 resolutions, (1/3)^5 of the depths, practically none of the policies.
    expected = ((largest, 0.4 + 0.6 / 25), (deepest, 0.3 + 0.7 / 3**5), (one, 0.3))
    for found, p in expected:
        assert binomtest(int(found.sum()), n, p).pvalue > 1e-3
    assert (one == drawn[:, 2]).all()
    for width in range(3):  # equally many at 2, 3 and 4 bits
        assert binomtest(int((one & (first[:, 0] == width)).sum()), n, 0.1).pvalue > 1e-3
    # The coins are independent of each other.
    assert binomtest(int(drawn[:, :2].all(axis=1).sum()), n, 0.4 * 0.3).pvalue > 1e-3
    assert binomtest(int(drawn[:, 1:].all(axis=1).sum()), n, 0.3 * 0.3).pvalue > 1e-3
    # What no stratum fixes stays uniform.
    assert binomtest(int((parts.ks[:, 0] == 0).sum()), n, 1 / 3).pvalue > 1e-3


def test_kernels_of_one_bit_width_are_uniform_among_the_legal_ones():
    genes, _ = draw_in_strata(TINY, 3000, PairStrata(**ALWAYS), np.random.default_rng(3))
    parts = view(TINY, genes)
    low = parts.bits[:, 0, 0] == 0
    assert binomtest(int(low.sum()), 3000, 1 / 2).pvalue > 1e-3
    assert (parts.ks[low] == 0).all()  # 5x5 at 4 bits is forbidden
    assert binomtest(int((parts.ks[~low, 0] == 0).sum()), int((~low).sum()), 1 / 2).pvalue > 1e-3


def test_a_pair_depends_on_seed_and_index_and_uniform_pairs_are_as_before():
    strata = PairStrata()
    chosen = [pair_subnet(QFA_MBV3, 3, i, quantized=True, strata=strata) for i in range(6)]
    assert chosen == [pair_subnet(QFA_MBV3, 3, i, quantized=True, strata=strata) for i in range(6)]
    assert len(set(chosen)) == 6
    uniform = sample(QFA_MBV3, 1, np.random.default_rng([3, 5, 1]))
    assert [pair_subnet(QFA_MBV3, 3, 5, quantized=True)] == subnets_of(QFA_MBV3, uniform)


@pytest.mark.parametrize("chance", [-0.1, 1.1, float("nan"), "half"])
def test_chances_are_from_0_to_1(chance):
    with pytest.raises(UserError, match=r"full_depth .* is not a chance"):
        PairStrata(full_depth=chance)


def test_recipes_have_the_published_values():
    """collect_network_info.py and nsgaii_search.py of apple/ml-batchquant."""
    for recipe in (QFA_IMAGENET_RECIPE, QFA_GLYPHS_RECIPE):
        strata = recipe.pair_strata
        assert (strata.full_resolution, strata.full_depth, strata.one_bit_width) == (0.4, 0.3, 0.3)
    rule = QFA_IMAGENET_RECIPE.pair_outliers
    assert (rule.neighbours, rule.distances, rule.flops_unit) == (5, (0.55, 0.4, 0.4, 0.4), 1e6)
    uniform = {
        recipe.name for recipe in RECIPES.values() if recipe.pair_strata is None and recipe.pair_outliers is None
    }
    assert uniform == {*RECIPES} - {"qfa-imagenet", "qfa-glyphs"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a mixed-precision supernet that is calibrated, but not trained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = replace(QFA_MBV3_GLYPHS, name="small", dataset="digits", n_classes=10, resolutions=(16, 24))
    splits = load_splits(space)
    net = first_supernet(space, BATCHQUANT, None, splits, 64, torch.device("cpu"))
    save_supernet(tmp_path / "models/small/supernet.pt", net, "tiny-qfa", splits.source)
    return tmp_path


def test_the_script_draws_in_strata_and_says_so(here, monkeypatch, capsys):
    recipe = replace(TINY_QFA_RECIPE, pair_strata=PairStrata(**ALWAYS), pair_outliers=OutlierRule(distances=(40.0,)))
    monkeypatch.setitem(RECIPES, "tiny-qfa", recipe)
    monkeypatch.setattr(elastic_nn.training.pairs, "subnet_top1", lambda net, subnet, *rest: sum(subnet.e) / 100)
    short = partial(methods.prepare.predictor.PredictorConfig, epochs=1)
    monkeypatch.setattr(methods.prepare.predictor, "PredictorConfig", short)
    prepare = ["--prepare", "acc_quant", "--acc_predictor_dir", "models/small", "--acc_train_sample", "12"]
    search([*prepare, "--json"])
    shown = capsys.readouterr()
    data = json.loads(shown.out)["data"]
    assert data["strata"] == ALWAYS
    assert data["outliers"] == {"n": 0, "distances": [40.0], "neighbours": 5, "flops_unit": 1e6}
    assert "0 of 12 pairs are outliers, not trained on" in shown.err
    store = PairStore(here / "dataset/NetInfo/small/acc_quant")
    assert read_json(store.path / "meta.json")["strata"] == ALWAYS
    space = load_supernet(here / "models/small/supernet.pt")[0].space
    for subnet in subnets_of(space, store.load(space)[0]):
        assert (subnet.resolution, subnet.d) == (24, (3, 3, 3))
        assert len({*subnet.shared_bits, *(bits for row in subnet.bits for bits in row)}) == 1
    with pytest.raises(UserError, match="strata was given, is not; give another folder with --netinfo"):
        search([*prepare, "--overwrite", "--pairs", "uniform"])
    monkeypatch.setitem(RECIPES, "tiny-qfa", TINY_QFA_RECIPE)
    search([*prepare, "--overwrite", "--pairs", "stratified", "--netinfo", "published"])
    assert read_json(here / "published/acc_quant/meta.json")["strata"] == {
        "full_resolution": 0.4,
        "full_depth": 0.3,
        "one_bit_width": 0.3,
    }
    search([*prepare, "--overwrite", "--netinfo", "uniform"])
    uniform = read_json(here / "uniform/acc_quant/meta.json")
    assert uniform.keys() == {"space", "seed", "recalibration_images", "supernet", "images"}
    genes, _ = PairStore(here / "uniform/acc_quant").load(space)
    drawn = [sample(space, 1, np.random.default_rng([0, i, 1]))[0] for i in range(12)]
    assert (genes == canonical(space, np.array(drawn))).all()
    with pytest.raises(UserError, match="--pairs belongs to --prepare acc_quant"):
        with_pairs(recipe, "uniform", quantized=False)
