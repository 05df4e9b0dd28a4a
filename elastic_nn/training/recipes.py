"""The training recipes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apq.bit_widths import bits_throughout
from apq.errors import UserError
from apq.presets import find_preset
from apq.space import SearchSpace
from dataset.table import DATASETS
from elastic_nn.training.apq_recipes import (
    APQ_IMAGENET_RECIPE,
    DIGITS_RECIPE,
    FASHION_RECIPE,
    GLYPHS_RECIPE,
    TINY_RECIPE,
)
from elastic_nn.training.haq_recipes import HAQ_IMAGENET_KMEANS_RECIPE, HAQ_IMAGENET_LINEAR_RECIPE
from elastic_nn.training.oqa_recipes import (
    OQA_GLYPHS_2BIT_RECIPE,
    OQA_GLYPHS_3BIT_RECIPE,
    OQA_GLYPHS_FLOAT_RECIPE,
    OQA_GLYPHS_RECIPE,
    OQA_IMAGENET_2BIT_RECIPE,
    OQA_IMAGENET_3BIT_RECIPE,
    OQA_IMAGENET_FLOAT_RECIPE,
    OQA_IMAGENET_RECIPE,
    TINY_SANDWICH_RECIPE,
)
from elastic_nn.training.qfa_recipes import QFA_GLYPHS_RECIPE, QFA_IMAGENET_RECIPE, TINY_QFA_RECIPE
from elastic_nn.training.recipe import Recipe

if TYPE_CHECKING:
    from dataset.splits import ImageSpec

RECIPES = {
    recipe.name: recipe
    for recipe in (
        DIGITS_RECIPE,
        GLYPHS_RECIPE,
        FASHION_RECIPE,
        APQ_IMAGENET_RECIPE,
        TINY_RECIPE,
        TINY_SANDWICH_RECIPE,
        OQA_IMAGENET_FLOAT_RECIPE,
        OQA_IMAGENET_RECIPE,
        OQA_IMAGENET_3BIT_RECIPE,
        OQA_IMAGENET_2BIT_RECIPE,
        OQA_GLYPHS_FLOAT_RECIPE,
        OQA_GLYPHS_RECIPE,
        OQA_GLYPHS_3BIT_RECIPE,
        OQA_GLYPHS_2BIT_RECIPE,
        QFA_IMAGENET_RECIPE,
        QFA_GLYPHS_RECIPE,
        TINY_QFA_RECIPE,
        HAQ_IMAGENET_KMEANS_RECIPE,
        HAQ_IMAGENET_LINEAR_RECIPE,
    )
}
AT_BITS = {  # recipes of supernets at fewer bits, which start from one of more bits
    ("oqa-imagenet", 3): "oqa-imagenet-3bit",
    ("oqa-imagenet", 2): "oqa-imagenet-2bit",
    ("oqa-glyphs", 3): "oqa-glyphs-3bit",
    ("oqa-glyphs", 2): "oqa-glyphs-2bit",
}
FLOAT_FIRST = {  # recipe of a quantized supernet -> that of the float supernet that it starts from
    **dict.fromkeys(("oqa-imagenet", "oqa-imagenet-3bit", "oqa-imagenet-2bit"), "oqa-imagenet-float"),
    **dict.fromkeys(("oqa-glyphs", "oqa-glyphs-3bit", "oqa-glyphs-2bit"), "oqa-glyphs-float"),
    "qfa-imagenet": "oqa-imagenet-float",
    "qfa-glyphs": "oqa-glyphs-float",
}


def get_recipe(name: str | None, spec: ImageSpec, *, in_float: bool = False) -> Recipe:
    """The recipe of this name, or by default that of a space or a model. UserError names the known ones.

    A space of one bit-width has the recipe for 4 bits if there is none for its own. With `in_float` it is the recipe of
    the float supernet from which a quantized one starts.
    """
    known = ", ".join(RECIPES)
    if name is None:
        name = own_recipe(spec)
        if name is None:
            raise UserError(f"{spec.name} has no training recipe of its own: give --recipe, one of {known}")
        name = FLOAT_FIRST.get(name, name) if in_float else name
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; known: {known}")
    return RECIPES[name]


def own_recipe(spec: ImageSpec) -> str | None:
    """The recipe of a space, or of the preset with its name (files record no recipe), or of the data set."""
    if isinstance(spec, SearchSpace) and (space := spec if spec.recipe else find_preset(spec.name)):
        return AT_BITS.get((space.recipe, bits_throughout(space)), space.recipe)
    return DATASETS[spec.dataset].recipe if spec.dataset in DATASETS else None
