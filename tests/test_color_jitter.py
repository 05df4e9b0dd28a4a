"""Colour jitter: the numbers of recipes, what it does to an image, and that each training has that of its recipe."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_dataset import make_folder

from apq.errors import UserError
from apq.presets import DIGITS
from apq.resume import difference
from dataset import load_splits
from dataset.color_jitter import ONCE_FOR_ALL, ColorJitter
from dataset.crops import MEAN, STD, jitter_transform, random_crop
from dataset.imagenet import image_folder_space
from elastic_nn.training.model_training import ModelRequest, model_plan, model_record
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session

PUBLISHED = [name for name in RECIPES if name.startswith(("apq-imagenet", "oqa-imagenet", "qfa-imagenet"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_change_brightness_and_saturation_alone(name):
    """OQA, appendix A.2: [32/255, 0, 0.5, 0]; once-for-all's and QFA's distort_color "tf"."""
    transform = jitter_transform(RECIPES[name].color_jitter)
    assert transform.brightness == pytest.approx((1 - 32 / 255, 1 + 32 / 255))
    assert transform.saturation == pytest.approx((0.5, 1.5))
    assert (transform.contrast, transform.hue) == (None, None)


def test_other_recipes_change_three_by_two_fifths():
    for name in RECIPES.keys() - {*PUBLISHED}:
        if not name.startswith("haq"):
            transform = jitter_transform(RECIPES[name].color_jitter)
            for factors in (transform.brightness, transform.contrast, transform.saturation):
                assert factors == pytest.approx((0.6, 1.4)), name
            assert transform.hue is None


def shown(color, jitter, n=250):
    """The first pixel of `n` views of a picture of one colour, 0 to 255: (n, 3)."""
    picture, views = Image.new("RGB", (12, 12), color), []
    torch.manual_seed(0)
    for _ in range(n):
        views.append(255 * (random_crop(8, jitter)(picture)[:, 0, 0].numpy() * STD + MEAN))
    return np.stack(views)


def test_what_it_does_to_an_image():
    # Grey: saturation leaves it, contrast would too; brightness multiplies it.
    grey = shown((128, 128, 128), ONCE_FOR_ALL)
    assert np.ptp(grey, axis=1).max() < 1
    assert 128 * (1 - 32 / 255) - 1 <= grey.min() < 128 * (1 - 0.9 * 32 / 255)
    assert 128 * (1 + 0.9 * 32 / 255) < grey.max() <= 128 * (1 + 32 / 255) + 1
    # The distance of two channels is multiplied by both factors.
    apart = shown((120, 80, 80), ONCE_FOR_ALL)
    ratio = (apart[:, 0] - apart[:, 1]) / 40
    assert 0.5 * (1 - 32 / 255) - 0.05 <= ratio.min() < 0.55
    assert 1.45 < ratio.max() <= 1.5 * (1 + 32 / 255) + 0.05
    assert np.abs(shown((120, 80, 80), None, n=5) - [120, 80, 80]).max() < 1e-3


@pytest.mark.parametrize("wrong", [{"brightness": -0.1}, {"hue": 0.6}, {"contrast": float("nan")}])
def test_amounts_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="colour jitter needs"):
        ColorJitter(**wrong)


def test_training_records_depend_on_it(tmp_path):
    folder = make_folder(tmp_path / "cats")
    space = image_folder_space(DIGITS, folder)

    def records(jitter):
        recipe = replace(RECIPES["tiny"], color_jitter=jitter)
        session = Session(splits=load_splits(space, folder, jitter), device=torch.device("cpu"))
        spec, _, config = model_plan(ModelRequest(name="mobilenet_v2_small", data=folder, recipe="tiny"))
        plan = SupernetPlan(space=space, recipe=recipe)
        return supernet_record(plan, session), model_record(spec, config, session)

    strong = ColorJitter(brightness=0.4)
    for one, other in zip(records(ONCE_FOR_ALL), records(strong), strict=True):
        assert difference(one, other) == (
            f"images.color_jitter.brightness was {32 / 255}, is 0.4; images.color_jitter.saturation was 0.5, is 0.0"
        )
    assert not difference(records(strong), records(strong))
    assert difference(records(None), records(strong)).startswith("[0].images.color_jitter changed")


def calls_of(name, *rooms):
    """(file, call) for all calls of a function in some rooms."""
    for file in sorted(path for room in rooms for path in ROOT.glob(f"{room}/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield file.relative_to(ROOT), node


def test_every_training_loads_images_with_the_jitter_of_its_recipe():
    measures = "elastic_nn/training/experiment_network.py"  # and trains nothing
    calls = [(file, call) for file, call in calls_of("load_splits", "elastic_nn", "methods") if str(file) != measures]
    assert len(calls) >= 8
    for file, call in calls:
        given = [*call.args[2:3], *(word.value for word in call.keywords if word.arg == "color_jitter")]
        assert [isinstance(value, ast.Attribute) and value.attr for value in given] == ["color_jitter"], file


def test_images_for_a_network_that_exists_have_its_classes():
    """All but the training of a new network take folders with some of the classes of their network."""
    calls = list(calls_of("load_splits", "elastic_nn", "methods", "report"))
    assert len(calls) >= 10
    named = [len(call.args) > 3 or "outputs" in {word.arg for word in call.keywords} for _, call in calls]
    without = {str(file) for (file, _), names in zip(calls, named, strict=True) if not names}
    assert without == {"elastic_nn/training/model_training.py"}
