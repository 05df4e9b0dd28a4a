"""The sequential baseline that joint search is compared with: architecture, then channels, then bits.

Each stage has its own budget, all of one quantity and counted over all layers, and knows nothing of those after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

from apq.checkpoint import digest
from apq.errors import UserError
from apq.files import Record
from apq.model import ModelSpec, subnet_model
from apq.resume import NOT_KEPT, Resume, State
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from dataset.splits import make_loader
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.batchnorm import RECALIBRATION_BATCH, recalibrate
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.finetune import finetune
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Session
from lut.cost_model import CostModel
from methods.search import evolution_finder
from methods.search.bit_search import FoundPolicy, environment_of, make_task, search_bits
from methods.search.episodes import Found
from methods.search.settings import PolicySearch
from methods.sequential.architecture import search_architecture, subnet_cost
from methods.sequential.config import SequentialConfig
from methods.sequential.pruning import FloatSubnet, prune_channels, search_widths
from utils.accuracy_predictor import AccuracyPredictor

STATE = "sequential.state.pt"  # in the folder of an unfinished experiment
STAGES = ("pruning", "finetune", "bits")  # those with states of their own beside it

Log = Callable[[str, Record], None]  # takes a stage's name and one of its records


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the stages start from: a float supernet, a float predictor of its accuracy, its recipe, and prices.

    UserError for parts that the baseline cannot use.
    """

    supernet: DynamicProxylessNASNets
    predictor: AccuracyPredictor
    recipe: Recipe
    cost_model: CostModel

    def __post_init__(self) -> None:
        if self.predictor.quantize or self.predictor.space != self.space:
            raise UserError(f"the sequential search needs a float predictor of space {self.space.name}")
        if any(stage.squeeze for stage in self.space.stages):
            raise UserError(f"space {self.space.name} has squeeze-and-excitation, whose channels AMC does not prune")

    @property
    def space(self) -> SearchSpace:
        """The space of the supernet."""
        return self.supernet.space


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a stage ended with: its budget and cost in the quantity's unit, and a top-1 (0 to 1).

    `measured` says what the accuracy is of.
    """

    stage: str
    budget: float
    cost: float
    accuracy: float
    measured: str


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """Result of the baseline: the pruned and finetuned float network, its policy, and what each stage found."""

    net: MBConvNet
    spec: ModelSpec
    architecture: evolution_finder.Found
    widths: Found
    bits: FoundPolicy
    stages: list[StageFacts]


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """The finetuned network of the second stage, the search of its widths, and the facts of both stages so far."""

    whole: FloatSubnet
    widths: Found
    facts: list[StageFacts]

    @property
    def spec(self) -> ModelSpec:
        return subnet_model(self.whole.space, self.whole.subnet)


def asked_of(config: SequentialConfig, parts: Parts, session: Session) -> Record:
    """All that the result of `run_sequential` depends on, as plain data."""
    return {
        "config": asdict(config),
        "space": space_to_dict(parts.space),
        "supernet": digest(parts.supernet.state_dict()),
        "predictor": digest(parts.predictor.state_dict()),
        "recipe": asdict(parts.recipe),
        "cost": parts.cost_model.record(),
        "images": session.splits.source,
        "seed": session.seed,
        "execution": session.execution.record(),
    }


def remove_states(resume: Resume) -> None:
    """Remove the states of all stages: the work is finished and its result is stored, or it leads nowhere."""
    for stage in STAGES:
        resume.stage(stage).done()
    resume.done()


def run_sequential(
    config: SequentialConfig,
    parts: Parts,
    session: Session,
    resume: Resume = NOT_KEPT,
    log: Log = lambda stage, record: None,
) -> Sequential:
    """Run the three stages.

    The searches have their seeds in `config`; the session's seed is that of the float finetune. `resume` keeps the
    results of finished stages, files beside it the states of unfinished ones. The caller removes them by
    `remove_states` when the result is stored.
    """
    return _Run(config, parts, session, resume, log).all()


@dataclass(frozen=True)
class _Run:
    """The stages of one run, and what they share."""

    config: SequentialConfig
    parts: Parts
    session: Session
    resume: Resume
    log: Log

    def all(self) -> Sequential:
        """Run what the state does not hold yet."""
        state = self.resume.load() or {}
        if "architecture" not in state:
            state["architecture"] = self.architecture()
            self.resume.save(state)
        architecture = self.known_architecture(state["architecture"])
        whole = self.cut_out(architecture.subnet)
        if "pruned" in state:
            pruned = self.known_pruned(whole, state["pruned"])
        else:
            pruned = self.pruned(whole)
            self.resume.save({**state, "pruned": _state_of(pruned)})
        for stage in ("pruning", "finetune"):
            self.resume.stage(stage).done()
        bits, facts = self.bits(pruned)
        return Sequential(
            net=pruned.whole.net,
            spec=pruned.spec,
            architecture=architecture,
            widths=pruned.widths,
            bits=bits,
            stages=[*pruned.facts, facts],
        )

    def architecture(self) -> State:
        """The first stage, as plain data. It takes seconds and has no state of its own."""
        accuracy, space = self.parts.predictor.fast(), self.parts.space
        found = search_architecture(
            space,
            accuracy,
            self.parts.cost_model,
            self.config.architecture,
            lambda record: self.log("architecture", record),
        )
        facts = {"accuracy": found.accuracy, "cost": found.cost, "history": found.history}
        return {"subnet": architecture_of(space, found.subnet) | policy_of(space, found.subnet), **facts}

    def known_architecture(self, known: State) -> evolution_finder.Found:
        """The result of the first stage from its plain data."""
        return evolution_finder.Found(**{**known, "subnet": subnet_from_spec(self.parts.space, known["subnet"])})

    def cut_out(self, subnet: Subnet) -> FloatSubnet:
        """The architecture with its weights of the supernet."""
        self.parts.supernet.activate(subnet)
        net = self.parts.supernet.get_active_subnet().to(self.session.device)
        return FloatSubnet(net=net, space=self.parts.space, subnet=subnet)

    def pruned(self, whole: FloatSubnet) -> _Pruned:
        """The second stage with its float finetune."""
        session, side = self.session, whole.subnet.resolution
        self.recalibrate(whole)
        val = session.loader(session.splits.val, EVALUATION_BATCH, sides=(side,))
        float_top1 = evaluate(whole.net, val, session.device, execution=session.execution).top1
        pruned, widths, _ = search_widths(
            whole,
            self.parts.cost_model,
            self.config.widths,
            session,
            self.resume.stage("pruning"),
            lambda record: self.log("pruning", record),
        )
        self.check_bits(pruned)  # before the long part
        self.recalibrate(pruned)
        top1, weights = finetune(
            pruned.net,
            session,
            self.config.finetune,
            side=side,
            resume=self.resume.stage("finetune"),
            log=lambda record: self.log("finetune", record),
        )
        pruned.net.load_state_dict(weights)
        return _Pruned(whole=pruned, widths=widths, facts=self.float_facts(whole, float_top1, pruned, top1))

    def float_facts(
        self, whole: FloatSubnet, whole_top1: float, pruned: FloatSubnet, pruned_top1: float
    ) -> list[StageFacts]:
        """The facts of the first two stages."""
        split = self.config.split
        rows = (
            ("architecture", split.architecture_budget, whole, whole_top1, "float, as cut out of the supernet"),
            ("pruning", split.pruning_budget, pruned, pruned_top1, "float, finetuned"),
        )
        return [
            StageFacts(
                stage=stage,
                budget=budget,
                cost=subnet_cost(one.space, one.subnet, self.config.quantity, self.parts.cost_model),
                accuracy=top1,
                measured=measured,
            )
            for stage, budget, one, top1, measured in rows
        ]

    def known_pruned(self, whole: FloatSubnet, known: State) -> _Pruned:
        """The result of the second stage from its state."""
        pruned = prune_channels(whole, known["mid_channels"])
        pruned.net.load_state_dict(known["weights"])
        widths = Found(candidate=known["mid_channels"], episode=known["episode"], history=known["history"])
        return _Pruned(whole=pruned, widths=widths, facts=[StageFacts(**facts) for facts in known["facts"]])

    def bits(self, pruned: _Pruned) -> tuple[FoundPolicy, StageFacts]:
        """The last stage. It quantizes a copy of the network."""
        config, quantity = self.config, self.config.quantity
        task = make_task(copy.deepcopy(pruned.whole.net), pruned.spec, "linear", quantity, self.parts.cost_model)
        search = PolicySearch(bits=config.bits, agent=config.bits_agent, train=self.parts.recipe.pair_finetune)
        state = self.resume.stage("bits")
        found = search_bits(task, search, self.session, state, lambda record: self.log("bits", record))
        best = found.episodes.record
        return found, StageFacts(
            stage="bits",
            budget=config.split.constraint,
            cost=best["cost"],
            accuracy=best["accuracy"],
            measured="after an episode's finetune, on its validation images",
        )

    def check_bits(self, pruned: FloatSubnet) -> None:
        """UserError, and no state is left of these settings, if not even the cheapest bits reach the last budget."""
        spec = subnet_model(pruned.space, pruned.subnet)
        try:
            environment_of(
                make_task(pruned.net, spec, "linear", self.config.quantity, self.parts.cost_model), self.config.bits
            )
        except UserError as error:
            remove_states(self.resume)
            raise UserError(
                f"the pruned network leaves bits too much to do: {error}; "
                "raise --preserve_ratio, so that pruning takes more, or the constraint"
            ) from error

    def recalibrate(self, whole: FloatSubnet) -> None:
        """Give a network BatchNorm statistics of its own, on as many images as the recipe says."""
        loader = make_loader(self.session.splits.calibration, RECALIBRATION_BATCH, sides=(whole.subnet.resolution,))
        device, n_images = self.session.device, self.parts.recipe.recalibration_images
        recalibrate(whole.net.to(device), loader, device, n_images)


def _state_of(pruned: _Pruned) -> State:
    return {
        "weights": pruned.whole.net.state_dict(),
        "mid_channels": pruned.widths.candidate,
        "episode": pruned.widths.episode,
        "history": pruned.widths.history,
        "facts": [asdict(facts) for facts in pruned.facts],
    }
