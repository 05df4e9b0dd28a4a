"""What all questions of one seed share: its supernet, pairs, predictors, fixed network, the end of every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apq.checkpoint import check_fit, load_checkpoint, save_checkpoint
from apq.files import Record
from apq.model import subnet_model
from apq.model_folder import ModelFolder
from apq.policy import LINEAR
from apq.subnet import Subnet
from benchmarks.evidence_setting import COST_MODEL, Setting, middle_subnet
from benchmarks.final_finetune import finetuned
from benchmarks.supernets import trained_once
from dataset.pairs import PairStore
from dataset.splits import Splits
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.supernet_file import with_quantizers
from elastic_nn.quantizers import scheme_named
from elastic_nn.training.batchnorm import recalibrate, recalibration_batches
from elastic_nn.training.engine import derived_seed
from elastic_nn.training.finetune import finetune
from elastic_nn.training.pairs import short_finetune_top1
from elastic_nn.training.progressive_shrinking import SupernetPlan
from elastic_nn.training.session import Session
from methods.prepare.plan import Preparation
from methods.prepare.predictor import gather
from methods.search.bit_search import Task, make_task
from utils.accuracy_predictor import AccuracyPredictor
from utils.predictor_training import PredictorConfig, train_predictor

FLOAT_EPOCHS = 1  # of the fixed network, and of the sequential method's pruned one


class NoResult(Exception):  # noqa: N818 - an outcome of a method, not a fault
    """A method finds nothing within a budget. The text says why."""


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What a search has cost: subnets measured (a short finetune and a score each), images trained and scored on.

    Candidates of an agent that come up again are counted, though they are not measured again.
    """

    measured: int = 0
    trained_images: int = 0
    scored_images: int = 0

    def __add__(self, other: SearchCost) -> SearchCost:
        return SearchCost(**{key: value + asdict(other)[key] for key, value in asdict(self).items()})


class Ground:
    """The parts of one seed, each made when it is first asked for, and kept in `folder` if it takes long.

    `splits` are cut: the same part of the validation images for all scores, and of the training images for the final
    finetune. The test images are used by `final` alone.
    """

    def __init__(self, setting: Setting, seed: int, folder: Path, splits: Splits, device: torch.device) -> None:
        self.setting, self.seed, self.device = setting, seed, device
        self.folder, self._made = ModelFolder(folder), {}
        source = {**splits.source, "val_images": setting.val_images}
        self.splits = replace(splits, val=splits.val.thinned(setting.val_images), source=source)
        self.final_splits = replace(self.splits, train=splits.train.thinned(setting.final_images))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made when it is first asked for: a part that one question alone needs."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def session(self) -> Session:
        """Of everything but the final finetune."""
        return Session(splits=self.splits, device=self.device, seed=self.seed)

    @cached_property
    def supernet(self) -> DynamicProxylessNASNets:
        """The float supernet. A killed training continues."""
        plan = SupernetPlan(space=self.setting.space, recipe=self.setting.recipe)
        return trained_once(self.folder, plan, self.session)

    @cached_property
    def quantized(self) -> DynamicQuantizedProxylessNASNets:
        """The supernet with quantizers, of which subnets are cut out and finetuned."""
        return with_quantizers(self.supernet, scheme_named(self.setting.recipe.quantizer))

    @cached_property
    def float_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Genes (n, genes) and accuracies (n,) of float subnets."""
        return self._pairs("acc", self.supernet, self.setting.n_float)

    @cached_property
    def quant_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The same of quantized subnets, each after the short finetune."""
        return self._pairs("acc_quant", self.quantized, self.setting.n_quant)

    def _pairs(self, kind: str, supernet: DynamicProxylessNASNets, n: int) -> tuple[np.ndarray, np.ndarray]:
        task = Preparation(
            folder=self.folder,
            kind=kind,
            supernet=supernet,
            recipe=self.setting.recipe,
            splits=self.splits,
            initial=None,
            n_pairs=n,
            store=PairStore(self.folder.path / kind),
        )
        gather(task, self.session)
        return task.store.load(task.space, n)

    def predictor_config(self) -> PredictorConfig:
        """Of all predictors of this seed: the seed also draws the held-out pairs."""
        hidden = self.setting.recipe.predictor_hidden
        return PredictorConfig(seed=self.seed, hidden=hidden, holdout=self.setting.holdout)

    @cached_property
    def float_predictor(self) -> AccuracyPredictor:
        """The MLP that all others start from."""
        how = {"quantize": False, "config": self.predictor_config()}
        return train_predictor(*self.float_pairs, self.setting.space, **how)[0]

    @cached_property
    def fixed_weights(self) -> dict[str, torch.Tensor]:
        """The weights of the fixed network: cut out, recalibrated, finetuned in floating point."""
        file = self.folder.path / "fixed.pt"
        if not file.exists():
            net, side = self._fixed_net(), self.fixed_subnet.resolution
            n = self.setting.recipe.recalibration_images
            recalibrate(net, recalibration_batches(self.splits, (side,), self.device, n), self.device, n)
            config = replace(self.setting.recipe.finetune, epochs=FLOAT_EPOCHS)
            top1, weights = finetune(net, replace(self.session, splits=self.final_splits), config, side=side)
            save_checkpoint(file, {"state_dict": weights, "val_top1": top1})
        return load_checkpoint(file, ("state_dict",))["state_dict"]

    @property
    def fixed_subnet(self) -> Subnet:
        return middle_subnet(self.setting.space)

    def _fixed_net(self) -> MBConvNet:
        self.supernet.activate(self.fixed_subnet)
        return self.supernet.get_active_subnet().to(self.device)

    def fixed_task(self, quantity: str) -> Task:
        """The fixed network, new from its weights, and the costs of its bits."""
        net = self._fixed_net()
        check_fit(self.fixed_weights, net.state_dict())
        net.load_state_dict(self.fixed_weights)
        return make_task(net, subnet_model(self.setting.space, self.fixed_subnet), LINEAR, quantity, COST_MODEL)

    def short_top1(self, subnet: Subnet, number: int) -> float:
        """Validation top-1 of a quantized subnet after the short finetune, whose images depend on `number`."""
        own = self.session.alone(seed=derived_seed(self.seed, number))
        return short_finetune_top1(self.quantized, subnet, own, self.setting.recipe)

    def final(self, net: nn.Module, side: int) -> Record:
        """Validation and test top-1 of a calibrated network after the final finetune."""
        found = finetuned(net, self.final_splits, self.setting.recipe, side, self.seed, self.device)
        return {key: found[key] for key in ("val_top1", "test_top1")}

    def measured(self, n: int) -> SearchCost:
        """The cost of `n` short finetunes with their scores."""
        recipe = self.setting.recipe
        trained = recipe.pair_finetune.epochs * min(recipe.pair_epoch_images, len(self.splits.train))
        return SearchCost(measured=n, trained_images=n * trained, scored_images=n * len(self.splits.val))

    def scored(self, n: int) -> SearchCost:
        """The cost of `n` scores without training."""
        return SearchCost(scored_images=n * len(self.splits.val))

    def float_finetune(self) -> SearchCost:
        """The cost of a float finetune, which is scored before and after every epoch."""
        trained = FLOAT_EPOCHS * len(self.final_splits.train)
        return SearchCost(trained_images=trained) + self.scored(FLOAT_EPOCHS + 1)
