"""Do subnets of a supernet of mixed precision (QFA) need a finetune?

From the float supernet of the seed a supernet with BatchQuant is trained for all bits of the space, by QFA's two
stages with fewer subnets a step. Its pairs are measured as they are, a kernel regression learns them, and evolution
finds a subnet within each of five latencies. The same subnet is tested as it is in the supernet, recalibrated, and
after the final finetune. How flat the supernet's training was is in every line: "gain" is the validation top-1 of the
largest subnet after the last epoch less that at three quarters of the epochs, "loss_fall" the training loss then, of
subnets of all sizes and bits, less that of the last epoch.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from apq.files import Record, read_json
from apq.model_folder import ModelFolder
from apq.subnet import Subnet
from benchmarks.evidence_ground import Ground
from benchmarks.evidence_joint import evolved
from benchmarks.evidence_lines import Question, Run
from benchmarks.evidence_setting import COST_MODEL, SCOPE, Setting, budgets_of
from benchmarks.supernets import trained_once
from dataset.pairs import PairStore
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.quantizers import BATCHQUANT
from elastic_nn.training.engine import seed_epoch
from elastic_nn.training.finetune import quantized_subnet
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.progressive_shrinking import SupernetPlan
from elastic_nn.training.qfa_recipes import QFA_GLYPHS_RECIPE
from elastic_nn.training.recipe import Recipe
from lut.population import PopulationCost
from methods.prepare.plan import Preparation
from methods.prepare.predictor import gather
from methods.sequential.architecture import subnet_cost
from utils.kernel_predictor import KernelPredictor, train_kernel_predictor

METHODS = ("as it is", "finetuned")
QUANTITY = "latency"
SLACK = 1.25  # of the tightest budget over the cheapest subnet


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Epochs of the two stages, training images an epoch, subnets a step, pairs, budgets, images that epochs are
    scored on."""

    epochs: tuple[int, int]
    epoch_images: int
    subnets: int
    n_pairs: int
    n_budgets: int
    epoch_val_images: int


SIZES = {
    "fashion": Sizes(epochs=(4, 24), epoch_images=2000, subnets=4, n_pairs=200, n_budgets=5, epoch_val_images=3000),
    "tiny": Sizes(epochs=(1, 3), epoch_images=32, subnets=3, n_pairs=12, n_budgets=1, epoch_val_images=32),
}


def setting_of(setting: Setting) -> Record:
    """What lines record: the setting and the sizes of this question."""
    sizes = asdict(SIZES[setting.name])
    return {**setting.record(), **sizes, "epochs": list(sizes["epochs"])}


def limits_of(setting: Setting) -> list[float]:
    """The budgets, evenly spaced in the logarithm, up to the loosest of the other questions; a single one is that."""
    lowest = PopulationCost(setting.space, QUANTITY, COST_MODEL, SCOPE).cheapest()[0]
    high = budgets_of(setting, QUANTITY)[-1]
    found = np.geomspace(high, SLACK * lowest, SIZES[setting.name].n_budgets)[::-1]
    return [float(f"{limit:.4g}") for limit in found]


def runs(setting: Setting, seed: int) -> list[Run]:
    """The runs of a seed."""
    return [
        Run(question="qfa", seed=seed, method=method, quantity=QUANTITY, limit=limit)
        for limit in limits_of(setting)
        for method in METHODS
    ]


def measure(run: Run, ground: Ground) -> Record:
    """Find the subnet within the budget, and test it as it is or finetuned."""
    net, predictor = supernet(ground), ground.once("qfa predictor", lambda: predictor_of(ground))
    started, space = time.process_time(), ground.setting.space
    subnet, predicted = evolved(space, predictor.fast(), run, ground)
    seconds = time.process_time() - started
    return {
        **top1_of(net, subnet, run, ground),
        "cost": subnet_cost(space, subnet, QUANTITY, COST_MODEL),
        "predicted": predicted,
        "search": asdict(ground.scored(0)),
        "shared": {**asdict(ground.scored(SIZES[ground.setting.name].n_pairs)), "by": "all budgets"},
        "cpu_s": round(seconds, 1),
        **flatness(ground),
    }


def top1_of(net: DynamicProxylessNASNets, subnet: Subnet, run: Run, ground: Ground) -> Record:
    """Validation and test top-1 by the method of the run."""
    n_images = ground.setting.recipe.recalibration_images
    if run.method == "finetuned":
        seed_epoch(run.seed, 0)
        cut = quantized_subnet(net, subnet, ground.final_splits, n_images, ground.device)
        return ground.final(cut, subnet.resolution)
    val, test = (
        subnet_top1(net, subnet, ground.session, images, n_images) for images in (ground.splits.val, ground.splits.test)
    )
    return {"val_top1": val, "test_top1": test}


def supernet(ground: Ground) -> DynamicProxylessNASNets:
    """The supernet of mixed precision."""
    setting = ground.setting
    plan = SupernetPlan(space=setting.space, recipe=recipe_of(setting), scheme=BATCHQUANT, start=ground.supernet)
    return ground.once("qfa supernet", lambda: trained_once(folder_of(ground), plan, ground.session))


def folder_of(ground: Ground) -> ModelFolder:
    """The folder of the supernet and of its pairs."""
    return ModelFolder(ground.folder.path / "qfa")


def recipe_of(setting: Setting) -> Recipe:
    """QFA's two stages in little."""
    sizes = SIZES[setting.name]
    phases = tuple(
        replace(
            phase,
            train=replace(phase.train, epochs=n, warmup_epochs=min(1, n - 1)),
            subnets_per_step=sizes.subnets,
            epoch_images=sizes.epoch_images,
        )
        for phase, n in zip(QFA_GLYPHS_RECIPE.phases, sizes.epochs, strict=True)
    )
    n_images = setting.recipe.recalibration_images
    return replace(
        QFA_GLYPHS_RECIPE, phases=phases, recalibration_images=n_images, epoch_val_images=sizes.epoch_val_images
    )


def predictor_of(ground: Ground) -> KernelPredictor:
    """A kernel regression of pairs that are measured as they are in the supernet."""
    space, n = ground.setting.space, SIZES[ground.setting.name].n_pairs
    task = Preparation(
        folder=folder_of(ground),
        kind="acc_quant",
        supernet=supernet(ground),
        recipe=recipe_of(ground.setting),
        splits=ground.splits,
        initial=None,
        n_pairs=n,
        store=PairStore(folder_of(ground).path / "acc_quant"),
    )
    gather(task, ground.session)
    return train_kernel_predictor(*task.store.load(space, n), space, quantize=True, seed=ground.seed)


def flatness(ground: Ground) -> Record:
    """What the last quarter of all epochs changed, and the top-1 (0 to 1) that it ends with."""
    phases = read_json(folder_of(ground).training)["phases"]
    epochs = [epoch for phase in phases for epoch in phase["epochs"] if "loss" in epoch]
    top1, losses = ([epoch[key] for epoch in epochs] for key in ("largest_top1", "loss"))
    return {
        "gain": gain_of_last_quarter(top1),
        "loss_fall": -gain_of_last_quarter(losses),
        "supernet_top1": top1[-1],
        "epochs": len(epochs),
    }


def gain_of_last_quarter(values: list[float]) -> float:
    """The last value of the epochs less that at three quarters of them.

    >>> gain_of_last_quarter([0.5, 0.6, 0.75, 0.875])
    0.125
    """
    return values[-1] - values[max(1, len(values) * 3 // 4) - 1]


QUESTION = Question(
    name="qfa",
    title="Do subnets of a mixed-precision supernet need a finetune?",
    methods=METHODS,
    figures=(
        ("test_top1", "test top-1", 100, 2),
        ("val_top1", "validation top-1", 100, 2),
        ("cost", "cost", 1, 4),
        ("gain", "supernet's last quarter: gain", 100, 2),
        ("loss_fall", "fall of the loss", 1, 3),
    ),
    runs=runs,
    measure=measure,
    setting=setting_of,
)
