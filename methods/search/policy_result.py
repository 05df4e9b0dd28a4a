"""The result of a search for bits: its record, its files and what is printed, for every method that finds a policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from apq.cli import table
from apq.experiment import Experiment
from apq.model import ModelSpec
from apq.policy import Policy
from elastic_nn.networks.model_file import save_model
from methods.search.bit_search import Task
from methods.search.episodes import Found
from methods.search.settings import BitSearch
from report.plots import plot_episodes, plot_policy
from report.tables import bit_rows


def facts_of(
    policy: Policy, task: Task, config: BitSearch, found: Found | None, original: float | None
) -> dict[str, Any]:
    """What is known of a policy, as plain data."""
    bits = policy.matrix(config.image_bits)
    budget = config.ratio * task.costs.reference if config.budget is None else config.budget
    return {
        "search": asdict(config),
        "type": config.quantity,
        "unit": task.costs.unit,
        "image_bits": config.image_bits,
        "budget": budget if found else None,
        "cost": task.costs.total(bits),
        "ratio": task.costs.ratio(bits),
        "of_what": task.costs.of_what,
        "n_priced": task.costs.n_priced,
        "original_top1": original,
        "episode": found.record if found else None,
    }


def record(
    experiment: Experiment,
    task: Task,
    policy: Policy,
    found: Found | None,
    settings: dict[str, Any],
    spec: ModelSpec,
    state: dict[str, torch.Tensor],
) -> None:
    """Write the experiment: float weights, figures, policy."""
    with experiment.replaced() as new:
        save_model(new.model, spec, state, task.splits.source)
        if found:
            plot_episodes(found.history, new.plot, original=settings["original_top1"])
        plot_policy(policy, task.layers, new.bits_plot)
        new.save_policy(policy, task.layers, settings["cost"], settings, found.history if found else [])


def report(as_json: bool, experiment: Experiment, policy: Policy, settings: dict[str, Any], priced_by: object) -> None:
    """Print a policy and its cost."""
    shown = ("type", "unit", "budget", "cost", "ratio", "of_what", "original_top1", "episode")
    if as_json:
        facts = {key: settings[key] for key in shown}
        print(
            json.dumps(
                {"exp_dir": str(experiment.path), **facts, "priced_by": str(priced_by), "policy": policy.strategy}
            )
        )
        return
    print(f"{experiment.path}: {policy.quantizer} policy of {settings['model']}")
    print(table(bit_rows(policy)))
    quantity = f"{settings['type']} {settings['cost']:g} {settings['unit']}"
    covered = (
        f" (of the {settings['n_priced']} layers in the table)" if settings["n_priced"] < len(policy.names) else ""
    )
    print(f"{quantity}, {settings['ratio']:.4f} of {settings['of_what']}{covered}")
    if settings["episode"]:
        best = settings["episode"]
        print(
            f"top-1 {best['accuracy']:.2%} after the short finetune of episode {best['episode']}, "
            f"{settings['original_top1']:.2%} in floating point ({settings['search']['val_images']} validation images)"
        )
    if settings["type"] in ("latency", "energy"):
        print(f"{settings['type']}: {priced_by}")
