"""The sequential baseline of joint search: architecture, then channels, then bits.

Each stage has a budget of its own and knows nothing of later stages. All budgets limit one quantity over all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from apq.checkpoint import check_fit, digest
from apq.errors import UserError
from apq.files import Record
from apq.model import ModelSpec, subnet_model
from apq.resume import NOT_KEPT, Resume, State
from apq.schema import MOST, array, each, fields, mapping, number, text
from apq.schema import whole as whole_number
from apq.space import SearchSpace, space_to_dict
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.engine import EVALUATION_BATCH, evaluate
from elastic_nn.training.finetune import finetune
from elastic_nn.training.recipe import Recipe
from elastic_nn.training.session import Session
from lut.cost_model import CostModel
from methods.search import evolution_finder
from methods.search.bit_choices import BudgetError
from methods.search.bit_search import FoundPolicy, Task, environment_of, make_task, search_bits
from methods.search.episodes import Found
from methods.search.predicted import scorer
from methods.search.settings import PolicySearch
from methods.sequential.architecture import search_architecture, subnet_cost
from methods.sequential.config import SequentialConfig
from methods.sequential.pruning import FloatSubnet, prune_channels, search_widths, widest_network
from utils.accuracy_predictor import AccuracyPredictor

STATE = "sequential.state.pt"  # in the folder of an unfinished experiment
STAGES = ("pruning", "finetune", "bits")  # stages with a state of their own beside that file

Log = Callable[[str, Record], None]  # takes a stage's name and one of its records


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the stages start from: a float supernet, its recipe, a float accuracy predictor, and a cost model.

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
    """The budget, cost (in the unit of the quantity) and top-1 (0 to 1) of a stage.

    `measured` says how the accuracy was measured.
    """

    stage: str
    budget: float
    cost: float
    accuracy: float
    measured: str


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """The result: the pruned and finetuned float network, and what each stage found."""

    net: MBConvNet
    spec: ModelSpec
    architecture: evolution_finder.Found
    widths: Found
    bits: FoundPolicy
    stages: list[StageFacts]


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """The finetuned network of the second stage, its search, and the facts of the first two stages."""

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
        "prices": parts.cost_model.digest(),
        "images": session.splits.source,
        "seed": session.seed,
        "execution": session.execution.record(),
    }


def remove_states(resume: Resume) -> None:
    """Remove the states of all stages, once the result is stored or the search has failed."""
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

    The seeds of the searches are in `config`; that of the session is for the float finetune. `resume` keeps the results
    of finished stages, and files beside it keep the states of unfinished ones. The caller removes them with
    `remove_states` when the result is stored.
    """
    return _Run(config, parts, session, resume, log).all()


@dataclass(frozen=True)
class _Run:
    """The stages of one run, with what they share."""

    config: SequentialConfig
    parts: Parts
    session: Session
    resume: Resume
    log: Log

    def all(self) -> Sequential:
        """Run the stages that are not in the state."""
        state = self.resume.load(self.check) or {}
        if "architecture" not in state:
            state["architecture"] = self.architecture()
            self.resume.save(state)
        architecture = self.restored_architecture(state["architecture"])
        whole = self.cut_out(architecture.subnet)
        if "pruned" in state:
            pruned = self.restored_pruned(whole, state["pruned"])
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
        """Run the first stage and return its result as plain data. It takes seconds and keeps no state."""
        space, population = self.parts.space, self.config.architecture.evolution.population
        accuracy = scorer(self.parts.predictor, self.session.device, population)
        found = search_architecture(
            space,
            accuracy,
            self.parts.cost_model,
            self.config.architecture,
            lambda record: self.log("architecture", record),
        )
        facts = {"accuracy": found.accuracy, "cost": found.cost, "history": found.history}
        return {"subnet": architecture_of(space, found.subnet) | policy_of(space, found.subnet), **facts}

    def check(self, state: Any) -> None:
        """UserError unless this run can have saved the state."""
        own = {"architecture": self.check_architecture}
        pruned = {"pruned": mapping} if isinstance(state, dict) and "pruned" in state else {}
        fields(**own, **pruned)(state)
        if pruned:
            whole = self.cut_out(self.restored_architecture(state["architecture"]).subnet)
            self.check_pruned(whole, state["pruned"])

    def check_architecture(self, state: Any) -> None:
        """UserError unless this is a result of the first stage."""
        fields(subnet=mapping, accuracy=number(), cost=number(0), history=each(mapping))(state)
        subnet_from_spec(self.parts.space, state["subnet"])

    def check_pruned(self, whole: FloatSubnet, state: Any) -> None:
        """UserError unless this is the state of a result of the second stage for this network."""
        n = len(whole.subnet.running_slots(whole.space))
        facts = fields(stage=text, budget=number(0), cost=number(0), accuracy=number(0, 1), measured=text)
        fields(
            weights=mapping,
            mid_channels=array("i", n, low=1),
            episode=whole_number(0, MOST),
            history=each(mapping),
            facts=each(facts, len(STAGES) - 1),
        )(state)
        if state["episode"] >= len(state["history"]):
            raise UserError("its best episode is not among its episodes")
        check_fit(state["weights"], prune_channels(whole, state["mid_channels"]).net.state_dict())

    def restored_architecture(self, state: State) -> evolution_finder.Found:
        """The result of the first stage, from plain data."""
        return evolution_finder.Found(**{**state, "subnet": subnet_from_spec(self.parts.space, state["subnet"])})

    def cut_out(self, subnet: Subnet) -> FloatSubnet:
        """The architecture with the weights of the supernet."""
        self.parts.supernet.activate(subnet)
        net = self.parts.supernet.get_active_subnet().to(self.session.device)
        return FloatSubnet(net=net, space=self.parts.space, subnet=subnet)

    def pruned(self, whole: FloatSubnet) -> _Pruned:
        """Run the second stage and the float finetune."""
        session, side = self.session, whole.subnet.resolution
        # Episodes end close below their budget, where accuracy is best: they would be in vain if no bits fit there.
        self.check_bits(widest_network(whole, self.parts.cost_model, self.config.widths))
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
        self.check_bits(pruned)  # before the finetune, which takes long
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

    def restored_pruned(self, whole: FloatSubnet, state: State) -> _Pruned:
        """The result of the second stage, from its state."""
        pruned = prune_channels(whole, state["mid_channels"])
        pruned.net.load_state_dict(state["weights"])
        widths = Found(candidate=state["mid_channels"], episode=state["episode"], history=state["history"])
        return _Pruned(whole=pruned, widths=widths, facts=[StageFacts(**facts) for facts in state["facts"]])

    def bit_task(self, net: MBConvNet, spec: ModelSpec) -> Task:
        """The task of the last stage."""
        return make_task(net, spec, self.config.quantizer, self.config.quantity, self.parts.cost_model)

    def bits(self, pruned: _Pruned) -> tuple[FoundPolicy, StageFacts]:
        """Run the last stage, on a copy of the network."""
        config, task = self.config, self.bit_task(copy.deepcopy(pruned.whole.net), pruned.spec)
        search = PolicySearch(bits=config.bits, agent=config.bits_agent, train=self.parts.recipe.episode)
        state = self.resume.stage("bits")
        found = search_bits(task, search, self.session, state, lambda record: self.log("bits", record))
        best = found.episode
        return found, StageFacts(
            stage="bits",
            budget=config.split.constraint,
            cost=best["cost"],
            accuracy=best["accuracy"],
            measured="after an episode's finetune, on its validation images",
        )

    def check_bits(self, pruned: FloatSubnet) -> None:
        """UserError if even the cheapest bits are over the last budget. The states are removed then."""
        task = self.bit_task(pruned.net, subnet_model(pruned.space, pruned.subnet))
        try:
            environment_of(task, self.config.bits)
        except BudgetError as error:
            remove_states(self.resume)
            raise UserError(
                f"no bits of the pruned network are within the budget: {error}; "
                "raise --preserve_ratio, so that pruning removes more, or --constraint"
            ) from error

    def recalibrate(self, whole: FloatSubnet) -> None:
        """Recalibrate BatchNorm of a network, on the number of images in the recipe."""
        device, n_images = self.session.device, self.parts.recipe.recalibration_images
        loader = recalibration_batches(self.session.splits, (whole.subnet.resolution,), device, n_images)
        recalibrate(whole.net.to(device), loader, device, n_images)


def _state_of(pruned: _Pruned) -> State:
    return {
        "weights": pruned.whole.net.state_dict(),
        "mid_channels": pruned.widths.candidate,
        "episode": pruned.widths.episode,
        "history": pruned.widths.history,
        "facts": [asdict(facts) for facts in pruned.facts],
    }
