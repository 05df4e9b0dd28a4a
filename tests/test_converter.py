from __future__ import annotations

import numpy as np
import pytest
from example_spaces import ALL, CHOOSING_BITS, TINY, WIDE
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.errors import UserError
from apq.genes import active, canonical, cardinalities, sample, view
from apq.presets import APQ_IMAGENET
from apq.subnet import subnet_from_spec
from utils.converter import Converter

spaces = pytest.mark.parametrize("space", ALL.values(), ids=ALL)
seeds = given(seed=st.integers(0, 2**32 - 1))


def ones(vector):
    return np.flatnonzero(vector).tolist()


def test_published_dimensions(golden):
    data, converter = golden("apq_converter.json"), Converter()
    assert (converter.half_dim, converter.full_dim) == (data["half_dim"], data["full_dim"]) == (520, 772)


@pytest.mark.parametrize("part", ["specs", "extra_continuous_e"])
def test_published_vectors(golden, part):
    converter = Converter()
    for row in golden("apq_converter.json")[part]:
        if row.get("error"):
            with pytest.raises(UserError):
                converter.spec2feature(row["spec"])
            continue
        vector = converter.spec2feature(row["spec"])
        assert vector.dtype == np.float32
        assert vector.shape == (772,)
        assert ones(vector) == row["ones_quantize_true"]
        assert ones(converter.spec2feature(row["spec"], quantize=False)) == row["ones_quantize_false"]


def test_published_decoding(golden):
    for row in golden("apq_converter.json")["feature2spec"]:
        vector = np.zeros(772)
        vector[row["ones"]] = 1
        assert Converter().feature2spec(vector) == row["feature2spec"]


@spaces
def test_dimensions(space):
    converter = Converter(space)
    n_bits = sum(len(kind.choices) for kind in space.operands) * len(space.slots)
    n_bits += sum(len(shared.choices) for shared in space.shared_operands)
    widths = sum(len(slot.mid_channels) for slot in space.slots)
    several = len(space.resolutions) if len(space.resolutions) > 1 else 0
    if space.shared_operands:  # QFA's layout says depths, and two sections of bits that nothing has
        widths += sum(stage.depths[-1] for stage in space.stages)
        n_bits += 2 * 3
    assert converter.half_dim == len(space.kernel_sizes) * len(space.slots) + widths + several
    assert converter.full_dim == converter.half_dim + n_bits


@spaces
@seeds
@settings(max_examples=20)
def test_decode_undoes_encode(space, seed):
    converter = Converter(space)
    genes = sample(space, 10, np.random.default_rng(seed))
    features = converter.encode(genes)
    assert features.dtype == np.float32
    assert (converter.decode(features) == genes).all()


@spaces
@seeds
@settings(max_examples=20)
def test_specs_round_trip(space, seed):
    converter = Converter(space, seed)
    spec = converter.random_spec()
    assert converter.is_valid(spec)
    assert converter.feature2spec(converter.spec2feature(spec)) == spec
    assert (converter.spec2feature(subnet_from_spec(space, spec)) == converter.spec2feature(spec)).all()


@spaces
@seeds
@settings(max_examples=20)
def test_one_changed_active_gene_changes_the_vector(space, seed):
    converter, rng = Converter(space), np.random.default_rng(seed)
    genes = sample(space, 1, rng)
    counts = cardinalities(space)
    changed = np.repeat(genes, len(counts), axis=0)
    diagonal = np.arange(len(counts))
    changed[diagonal, diagonal] = (changed[diagonal, diagonal] + 1) % counts
    changed = canonical(space, changed)
    different = (changed != genes).any(axis=1)  # the others changed an idle slot, or have one choice
    assert ((converter.encode(changed) != converter.encode(genes)).any(axis=1) == different).all()
    slots = np.flatnonzero(active(space, genes)[0])
    bits = 2 * len(space.slots) + slots  # of the first operand kind
    assert (different[bits] == (counts[bits] > 1)).all()


@spaces
def test_quantize_off_sees_no_policy(space):
    converter = Converter(space, seed=0)
    spec = converter.random_spec()
    settings = {kind.setting: [kind.choices[-1]] * len(space.slots) for kind in space.operands}
    if space.shared_operands:
        settings["fixed_bits_setting"] = [shared.choices[-1] for shared in space.shared_operands]
    highest = converter.spec2feature({**spec, **settings})
    assert (converter.spec2feature(spec, quantize=False) == highest).all()
    assert (converter.spec2feature(spec) != highest).any() == (space.name in CHOOSING_BITS)


def test_the_resolution_closes_the_architecture_half():
    converter = Converter(WIDE)
    genes = sample(WIDE, 40, np.random.default_rng(0))
    section = converter.encode(genes)[:, converter.half_dim - 3 : converter.half_dim]
    assert (section.argmax(axis=1) == view(WIDE, genes).resolution).all()
    assert (section.sum(axis=1) == 1).all()


def test_random_specs_follow_the_seed():
    first, again = Converter(seed=5), Converter(seed=5)
    specs = [first.random_spec() for _ in range(3)]
    assert specs == [again.random_spec() for _ in range(3)]
    assert specs[0] != specs[1]
    assert Converter().random_spec(np.random.default_rng(5)) == specs[0]


def test_valid_means_every_position(golden):
    converter = Converter()
    spec = golden("apq_converter.json")["specs"][0]["spec"]
    assert converter.is_valid(spec)
    assert spec["d"][0] == 2
    for key, position, value in (("ks", 3, 4), ("e", 3, 9.0), ("dw_w_bits_setting", 2, 5), ("d", 1, 1)):
        bad = {**spec, key: [*spec[key][:position], value, *spec[key][position + 1 :]]}
        assert not converter.is_valid(bad)
    idle = {k: list(v) if v else v for k, v in spec.items()}
    idle["ks"][3], idle["dw_a_bits_setting"][3] = 7, 4
    subnet_from_spec(APQ_IMAGENET, idle)  # runs all the same: slot 3 is idle
    assert not converter.is_valid(idle)
    assert not converter.is_valid({})
    assert not converter.is_valid([1])


@pytest.mark.parametrize("spoil", [lambda x: x * 0, lambda x: x + 1, lambda x: x[:, :-1], lambda x: x[0]])
def test_decode_refuses_what_encode_cannot_have_made(spoil):
    converter = Converter(TINY)
    features = converter.encode(sample(TINY, 2, np.random.default_rng(0)))
    with pytest.raises(UserError):
        converter.decode(spoil(features))
