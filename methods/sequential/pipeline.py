"""The sequential baseline that joint search is compared with: architecture, then channels, then bits.

Each stage has its own budget, all of one quantity and counted over all layers, and knows nothing of those after it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apq.checkpoint import digest, load_checkpoint
from apq.errors import UserError
from apq.files import read_json, write_json
from apq.model import ModelSpec, subnet_model
from apq.policy import Policy
from apq.space import space_to_dict
from apq.subnet import Subnet, spec_of, subnet_from_spec
from dataset.splits import Splits, make_loader
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.model_file import load_model, save_model
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.engine import EVALUATION_BATCH, ONE_PROCESS, Execution, evaluate
from elastic_nn.training.finetune import finetune
from elastic_nn.training.recipe import Recipe
from lut.costs import CostSource
from methods.ddpg.bit_search import environment_of, make_task, search_bits
from methods.ddpg.ddpg_finder import Found
from methods.evolution import evolution_finder
from methods.sequential.architecture import search_architecture, subnet_cost
from methods.sequential.config import SequentialConfig
from methods.sequential.pruning import search_widths
from utils.accuracy_predictor import AccuracyPredictor

ARCHITECTURE, PRUNED = "architecture.json", "pruned.pt"  # results
PRUNING, FINETUNE, AGENT = "pruning.state.pt", "finetune.state.pt", "agent.state.pt"


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a stage ended with: its budget and cost in the quantity's unit, and a top-1 (0 to 1) of what it measures."""

    stage: str
    budget: float
    cost: float
    accuracy: float
    measured: str  # what the accuracy is


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Result of the baseline: the pruned float network, trained, its top-1 on an episode's validation images, its
    policy, and what each stage found."""

    net: MBConvNet
    spec: ModelSpec
    policy: Policy
    architecture: evolution_finder.Found
    widths: Found
    bits: Found
    original: float
    stages: list[StageFacts]

    @staticmethod
    def remove_states(folder: Path) -> None:
        """Remove what a run keeps in its folder to continue from, once its result is stored."""
        for name in (ARCHITECTURE, PRUNED, AGENT):
            (folder / name).unlink(missing_ok=True)


def run_sequential(
    config: SequentialConfig,
    supernet: DynamicProxylessNASNets,
    predictor: AccuracyPredictor,
    splits: Splits,
    recipe: Recipe,
    source: CostSource,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    execution: Execution = ONE_PROCESS,
    restart: bool = False,
    log: Callable[[str, dict[str, Any]], None] = lambda stage, record: None,
) -> Sequential:
    """Run the three stages within the space of a float supernet, with a float predictor of its accuracy.

    `folder` keeps the stages' results and states: a run that was killed continues by the same call and finds the same;
    files of another run are an error, or with `restart` are dropped. `agent.state.pt` stays at the end: remove it when
    the result is stored. `log` gets each record of each stage, "architecture", "pruning", "finetune" or "bits". The
    seeds of the searches are in `config`; `seed` is that of the float finetune.
    """
    if predictor.quantize or predictor.space != supernet.space:
        raise UserError(f"the sequential search needs a float predictor of space {supernet.space.name}")
    if any(stage.squeeze for stage in supernet.space.stages):
        raise UserError(f"space {supernet.space.name} has squeeze-and-excitation, whose channels AMC does not prune")
    asked = _plain(
        {
            "config": asdict(config),
            "space": space_to_dict(supernet.space),
            "supernet": digest(supernet.state_dict()),
            "predictor": digest(predictor.state_dict()),
            "recipe": asdict(recipe),
            "cost": source.record(),
            "images": splits.source,
            "seed": seed,
            "execution": execution.asked(),
        }
    )
    run = _Run(config, supernet, splits, recipe, source, folder, seed, device, execution, asked, restart, log)
    architecture = run.architecture(predictor)
    net, spec, widths, facts = run.pruned(architecture.subnet)
    task = make_task(copy.deepcopy(net), spec, splits, "linear", config.quantity, source)
    policy, bits, original = search_bits(
        task,
        config.bits,
        config.bits_agent,
        recipe,
        device=device,
        execution=execution,
        **run.loop("bits", AGENT),
    )
    quantized = StageFacts(
        stage="bits",
        budget=config.split.constraint,
        cost=bits.record["cost"],
        accuracy=bits.record["accuracy"],
        measured="after an episode's finetune, on its validation images",
    )
    return Sequential(
        net=net,
        spec=spec,
        policy=policy,
        architecture=architecture,
        widths=widths,
        bits=bits,
        original=original,
        stages=[*facts, quantized],
    )


@dataclass(frozen=True)
class _Run:
    """What all stages share."""

    config: SequentialConfig
    supernet: DynamicProxylessNASNets
    splits: Splits
    recipe: Recipe
    source: CostSource
    folder: Path
    seed: int
    device: torch.device
    execution: Execution
    asked: dict[str, Any]
    restart: bool
    log: Callable[[str, dict[str, Any]], None]

    def loop(self, stage: str, state: str) -> dict[str, Any]:
        """What a resumable stage needs to be one."""
        return {
            "state_file": self.folder / state,
            "asked": self.asked,
            "restart": self.restart,
            "log": lambda record: self.log(stage, record),
        }

    def architecture(self, predictor: AccuracyPredictor) -> evolution_finder.Found:
        """The first stage; its result is kept as JSON. It takes seconds and has no state."""
        file, space, config = self.folder / ARCHITECTURE, self.supernet.space, self.config
        if file.exists() and self.is_ours(file, known := read_json(file)):
            subnet = subnet_from_spec(space, {**known["arch"], **known["policy"]})
            rest = {key: known[key] for key in ("accuracy", "cost", "history")}
            return evolution_finder.Found(subnet=subnet, **rest)
        found = search_architecture(
            space,
            predictor.fast(),
            config.quantity,
            self.source,
            config.split.architecture_budget,
            config.evolution,
            on_generation=lambda record: self.log("architecture", record),
        )
        if self.execution.main:
            facts = {"accuracy": found.accuracy, "cost": found.cost, "history": found.history}
            write_json(file, {"asked": self.asked, **spec_of(space, found.subnet), **facts})
        return found

    def pruned(self, subnet: Subnet) -> tuple[MBConvNet, ModelSpec, Found, list[StageFacts]]:
        """The second stage with its float finetune: network, spec, search of widths, facts of both stages so far."""
        file = self.folder / PRUNED
        if file.exists() and self.is_ours(file, known := load_checkpoint(file)):
            net, spec, _ = load_model(file)
            candidate = known["mid_channels"].numpy()
            widths = Found(candidate=candidate, episode=known["episode"], history=known["history"])
            return net.to(self.device), spec, widths, [StageFacts(**facts) for facts in known["stages"]]
        space, config, side = self.supernet.space, self.config, subnet.resolution
        self.supernet.activate(subnet)
        net = self.recalibrated(self.supernet.get_active_subnet(), side)
        val = make_loader(
            self.splits.val,
            EVALUATION_BATCH,
            rank=self.execution.rank,
            world_size=self.execution.world_size,
            sides=(side,),
        )
        float_top1 = evaluate(net, val, self.device, execution=self.execution).top1
        net, pruned_subnet, widths, _ = search_widths(
            net,
            space,
            subnet,
            self.splits,
            self.source,
            config.widths,
            config.pruning_agent,
            device=self.device,
            execution=self.execution,
            **self.loop("pruning", PRUNING),
        )
        spec = subnet_model(space, pruned_subnet)
        try:  # a hopeless last budget shows before the long part
            environment_of(make_task(net, spec, self.splits, "linear", config.quantity, self.source), config.bits)
        except UserError as error:
            for name in (ARCHITECTURE, PRUNING):  # of these settings, which lead nowhere
                (self.folder / name).unlink(missing_ok=True)
            raise UserError(
                f"the pruned network leaves bits too much to do: {error}; "
                "raise --preserve_ratio, so that pruning takes more, or the constraint"
            ) from error
        top1, weights = finetune(
            self.recalibrated(net, side),
            self.splits,
            config.finetune,
            seed=self.seed,
            device=self.device,
            side=side,
            execution=self.execution,
            **self.loop("finetune", FINETUNE),
        )
        net.load_state_dict(weights)
        facts = [
            StageFacts(
                stage="architecture",
                budget=config.split.architecture_budget,
                cost=subnet_cost(space, subnet, config.quantity, self.source),
                accuracy=float_top1,
                measured="float, as cut out of the supernet",
            ),
            StageFacts(
                stage="pruning",
                budget=config.split.pruning_budget,
                cost=subnet_cost(space, pruned_subnet, config.quantity, self.source),
                accuracy=top1,
                measured="float, finetuned",
            ),
        ]
        if self.execution.main:
            found = {"mid_channels": torch.from_numpy(widths.candidate), "episode": widths.episode}
            stages = {"history": widths.history, "stages": [asdict(one) for one in facts], "asked": self.asked}
            save_model(file, spec, net.state_dict(), self.splits.source, **found, **stages)
            for state in (PRUNING, FINETUNE):
                (self.folder / state).unlink(missing_ok=True)
        return net, spec, widths, facts

    def recalibrated(self, net: MBConvNet, side: int) -> MBConvNet:
        """The network with BatchNorm statistics of its own, on as many images as the recipe says."""
        loader = make_loader(self.splits.calibration, RECALIBRATION_BATCH, sides=(side,))
        recalibrate(net.to(self.device), loader, self.device, self.recipe.recalibration_images)
        return net

    def is_ours(self, file: Path, known: Any) -> bool:
        """Whether a result is this run's; UserError if not, unless all may restart."""
        if isinstance(known, dict) and known.get("asked") == self.asked:
            return True
        if not self.restart:
            raise UserError(f"{file} belongs to another search; remove it or give --overwrite")
        return False


def _plain(asked: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON, so that it can be compared with what a file holds."""
    return json.loads(json.dumps(asked))
