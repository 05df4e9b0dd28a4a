"""The recipes of spaces, models and data sets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apq.bit_widths import at_bits
from apq.errors import UserError
from apq.presets import APQ_IMAGENET, DIGITS, QFA_MBV3, SPACES, published_space
from apq.space import space_from_dict, space_to_dict
from dataset.table import DATASETS, DataSet
from elastic_nn.networks.named_models import named_model
from elastic_nn.training.recipes import RECIPES, get_recipe

RECIPE_OF = {
    "digits": "digits",
    "glyphs": "glyphs",
    "fashion": "fashion",
    "apq-imagenet": "apq-imagenet",
    "oqa-mbv2": "oqa-imagenet",
    "oqa-mbv3": "oqa-imagenet",
    "oqa-mbv2-glyphs": "oqa-glyphs",
    "oqa-mbv3-glyphs": "oqa-glyphs",
    "qfa-mbv3": "qfa-imagenet",
    "qfa-mbv3-glyphs": "qfa-glyphs",
}


def recipe_at(name, bits):
    """The recipe of a preset at a bit-width. OQA's at 2 and 3 bits start from a supernet of more bits."""
    return f"{RECIPE_OF[name]}-{bits}bit" if name.startswith("oqa") and bits in (2, 3) else RECIPE_OF[name]


def test_every_preset_has_a_recipe():
    assert list(RECIPE_OF) == list(SPACES)
    assert {space.recipe for space in SPACES.values()} <= set(RECIPES)


@pytest.mark.parametrize("bits", [None, *range(2, 9)])
@pytest.mark.parametrize("name", SPACES)
def test_spaces_and_their_records_have_the_same_recipe(name, bits):
    space = SPACES[name] if bits is None else at_bits(SPACES[name], bits)
    expected = RECIPE_OF[name] if bits is None else recipe_at(name, bits)
    read = space_from_dict(space_to_dict(space))
    assert "recipe" not in space_to_dict(space)
    assert read.recipe is None
    assert (read, hash(read)) == (space, hash(space))
    for same in (space, read):
        assert get_recipe(None, same).name == expected
        quantized = name.startswith(("oqa", "qfa"))  # its float supernet is trained by a recipe of once-for-all's
        in_float = f"oqa-{space.dataset}-float" if quantized else expected
        assert get_recipe(None, same, in_float=True).name == in_float


def test_files_may_name_a_recipe():
    space = space_from_dict({**space_to_dict(DIGITS), "name": "mine", "dataset": "x", "recipe": "tiny"})
    assert get_recipe(None, space).name == "tiny"
    with pytest.raises(UserError, match="recipe must be the name"):
        space_from_dict({**space_to_dict(DIGITS), "recipe": 3})
    with pytest.raises(UserError, match="unknown recipe 'huge'"):
        get_recipe(None, replace(DIGITS, recipe="huge"))


def test_spaces_without_a_recipe_take_that_of_their_images(monkeypatch):
    assert get_recipe(None, replace(QFA_MBV3, name="mine", dataset="glyphs", recipe=None)).name == "glyphs"
    assert get_recipe(None, named_model("resnet18", "digits")).name == "digits"
    for bare in (published_space(n_classes=10), named_model("resnet18"), replace(APQ_IMAGENET, name="x", recipe=None)):
        with pytest.raises(UserError, match="has no training recipe of its own: give --recipe"):
            get_recipe(None, bare)
    row = DataSet(name="mine", in_channels=1, n_classes=2, side=8, load=lambda spec: None, recipe="tiny")
    monkeypatch.setitem(DATASETS, "mine", row)
    assert get_recipe(None, named_model("resnet18", "mine")).name == "tiny"
