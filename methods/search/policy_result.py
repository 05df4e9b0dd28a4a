"""The result of a search for a policy, by any method: its record, its files, its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from apq.experiment import Experiment
from apq.files import Record
from apq.model import ModelSpec
from apq.search_result import PolicyChoice, SearchResult
from elastic_nn.networks.model_file import save_model
from lut.cost_model import CostModel
from methods.search.bit_search import FoundPolicy, Task
from methods.search.settings import BitSearch
from report.plots import plot_episodes, plot_policy
from report.search_report import Heading, report_result


def choice_of(task: Task, config: BitSearch, found: FoundPolicy, model: str, recipe: str) -> PolicyChoice:
    """The choice of a policy for the network named `model`, whose training recipe is named `recipe`."""
    return PolicyChoice(
        policy=found.policy,
        layers=task.layers,
        model=model,
        recipe=recipe,
        image_bits=config.image_bits,
        ratio=task.costs.ratio(found.policy.matrix(config.image_bits)),
        of_what=task.costs.of_what,
        n_priced=task.costs.n_priced,
        original_top1=found.original,
    )


def result_of(
    method: str, choice: PolicyChoice, task: Task, config: BitSearch, found: FoundPolicy, settings: Record
) -> SearchResult:
    """The result of a method. `settings` are added to those of the search for bits."""
    budget = config.ratio * task.costs.reference if config.budget is None else config.budget
    best = found.episode
    return SearchResult(
        method=method,
        choice=choice,
        cost=task.costs.total(found.policy.matrix(config.image_bits)),
        quantity=config.quantity,
        unit=task.costs.unit,
        limit=budget if best else None,
        measured_top1=best and best["accuracy"],
        cost_model={"measured": None, **task.cost_model.record()},
        settings={"search": asdict(config), "episode": best, **settings},
        history=found.history,
    )


def store(
    experiment: Experiment,
    result: SearchResult,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    images: Record,
    draw_history: Callable[[Path], None] | None = None,
) -> None:
    """Write the experiment: the file of the float network, pictures, the result.

    `draw_history` draws its history into a file. By default it is that of an agent's episodes.
    """
    choice = result.found_policy
    draw = draw_history or partial(plot_episodes, result.history, original=choice.original_top1)
    with experiment.replaced() as new:
        save_model(new.model, spec, weights, images)
        if result.history:
            draw(new.path / "history.png")
        plot_policy(choice.policy, choice.layers, new.path / "bits.png")
        result.write(new)


def report(
    experiment: Experiment,
    result: SearchResult,
    cost_model: CostModel,
    first: str = "",
    facts: Mapping[str, Any] | None = None,
    *,
    as_json: bool,
) -> None:
    """Print a policy, its cost and the accuracy in its episode. `first` is a line before, `facts` more keys of JSON."""
    best, measured = result.settings["episode"], ""
    if best:
        asked = result.settings["search"]
        when, images = "after", f"{asked['val_images']} validation images"
        if asked["reward"] == "training":
            when, images = "within", f"the {asked['train_images']} images that it trains on"
        episode = f"episode {best['episode']}" if "episode" in best else "an episode"
        measured = (
            f"top-1 {best['accuracy']:.2%} {when} the short finetune of {episode}, "
            f"{result.found_policy.original_top1:.2%} in floating point ({images})"
        )
    heading = Heading(choice=first, measured=measured, facts={"episode": best, **(facts or {})})
    report_result(experiment, result, cost_model, heading, as_json=as_json)
