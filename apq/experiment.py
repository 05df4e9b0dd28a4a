"""The folder of one experiment: what was asked, what was found, what it reached. Every write is atomic."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apq.errors import UserError
from apq.files import atomic_open, check_writable, read_json, write_json
from apq.layers import ConvLayer
from apq.policy import Policy, policy_from_dict, policy_to_dict
from apq.presets import APQ_IMAGENET
from apq.space import SearchSpace, space_from_dict, space_to_dict
from apq.subnet import Subnet, architecture_of, policy_of, subnet_from_spec

PUBLISHED_CONFIG = {
    "space": space_to_dict(APQ_IMAGENET),
    "acc_predictor_dir": "models",
    "accelerator": {},  # all fields as published
    "table": None,
}
CONFIG_KEYS = set(PUBLISHED_CONFIG)  # what later scripts need of config.json
POLICY_CONFIG_KEYS = {"accelerator", "table", "model", "recipe", "image_bits", "type", "ratio", "of_what"}


@dataclass(frozen=True)
class Experiment:
    """`exps/NAME`: `arch` (a list of two objects, architecture then policy), `lat` (a list of its one cost),
    `config.json`, `history.jsonl`, `history.png`, `acc` and `checkpoint/model_best.pth.tar`.

    One for many budgets has `front.json` and `front.png`, the best subnets of a search by NSGA-II or coarse to fine, of
    which `arch` is one; coarse to fine also `evaluated.jsonl`, all that were measured. One that quantizes a given
    network has, instead of `arch`, its `policy`, and `model.pt`, the float network.
    """

    path: Path

    @property
    def arch(self) -> Path:
        return self.path / "arch"

    @property
    def policy(self) -> Path:
        return self.path / "policy.json"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def bits_plot(self) -> Path:
        return self.path / "bits.png"

    @property
    def lat(self) -> Path:
        return self.path / "lat"

    @property
    def acc(self) -> Path:
        return self.path / "acc"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "history.png"

    @property
    def search_state(self) -> Path:
        return self.path / "search.state.npz"

    @property
    def front_state(self) -> Path:
        return self.path / "front.state.npz"

    @property
    def evaluated(self) -> Path:
        return self.path / "evaluated.jsonl"

    @property
    def front(self) -> Path:
        return self.path / "front.json"

    @property
    def front_plot(self) -> Path:
        return self.path / "front.png"

    @property
    def agent_state(self) -> Path:
        return self.path / "agent.state.pt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoint" / "model_best.pth.tar"

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoint" / "checkpoint.pth.tar"

    def check_free(self, overwrite: bool) -> None:
        """UserError if it exists and may not be replaced, or cannot be written. For before the work."""
        check_writable(self.path)
        if (self.arch.exists() or self.policy.exists()) and not overwrite:
            raise UserError(f"experiment {self.path} exists; choose another --exp_name or give --overwrite")
        if any(self.path.glob("evaluated*.json*")) and not overwrite:
            raise UserError(f"{self.path} has measured subnets; choose another --exp_name or give --overwrite")

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Experiment]:
        """An empty experiment to fill: its files take the places of this one's if the block succeeds.

        `arch` or `policy`, which say that there is an experiment, go first and come last. Files of others are left
        alone.
        """
        new = Experiment(self.path / ".new")
        shutil.rmtree(new.path, ignore_errors=True)
        yield new
        evaluated = [file for file in self.path.glob("evaluated*.json*") if not (new.path / file.name).exists()]
        evaluated += [self.path / f"{name}.png" for name in ("depths", "shapes", "diagram")]  # of report.analyse
        own = (self.arch, self.policy, self.model, self.plot, self.bits_plot, self.acc, self.front, self.front_plot)
        for item in (*own, *evaluated):
            item.unlink(missing_ok=True)
        shutil.rmtree(self.best_checkpoint.parent, ignore_errors=True)
        for item in sorted(new.path.iterdir(), key=lambda item: item.name in (new.arch.name, new.policy.name)):
            item.replace(self.path / item.name)
        # The states go last: until here a killed run continues from them.
        for state in (self.search_state, self.front_state, self.agent_state):
            state.unlink(missing_ok=True)
        new.path.rmdir()

    def save_found(
        self, space: SearchSpace, subnet: Subnet, cost: float, config: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        """Write a finished search; `arch` comes last, so that it exists only beside all the rest."""
        self._save_search(cost, config, history)
        write_json(self.arch, [architecture_of(space, subnet), policy_of(space, subnet)])

    def save_policy(
        self,
        policy: Policy,
        layers: Sequence[ConvLayer],
        cost: float,
        config: dict[str, Any],
        history: list[dict[str, Any]],
    ) -> None:
        """Write a finished search of bits for a network of these layers; the policy comes last."""
        self._save_search(cost, config, history)
        write_json(self.policy, policy_to_dict(policy, layers))

    def _save_search(self, cost: float, config: dict[str, Any], history: list[dict[str, Any]]) -> None:
        write_json(self.config, config)
        with atomic_open(self.history) as file:
            file.writelines(json.dumps(record) + "\n" for record in history)
        write_json(self.lat, [cost])

    def load_policy(self) -> tuple[Policy, list[ConvLayer]]:
        """The policy of an experiment that has one, and the layers of its network."""
        try:
            return policy_from_dict(read_json(self.policy))
        except UserError as error:
            raise UserError(f"{self.policy}: {error}") from error

    def load_config(self) -> dict[str, Any]:
        """The settings that the search ran with; those of a published experiment, which has only an `arch` file, are
        the published ones. UserError where there was no search."""
        if not self.path.is_dir():
            raise UserError(f"no experiment at {self.path}; run search.py --exp_name {self.path.name} first")
        if self.arch.exists() and not self.config.exists():
            try:
                self.load_subnet(APQ_IMAGENET)
            except UserError as error:
                raise UserError(f"{self.path} has no {self.config.name}, and {error}") from error
            return dict(PUBLISHED_CONFIG)
        if not self.config.exists() and any(state.exists() for state in (self.search_state, self.front_state)):
            raise UserError(f"the search of {self.path} is not finished: its command continues it")
        config, needed = read_json(self.config), POLICY_CONFIG_KEYS if self.policy.exists() else CONFIG_KEYS
        if not isinstance(config, dict) or (missing := needed - set(config)):
            lacks = "is not an object" if not isinstance(config, dict) else f"lacks {', '.join(sorted(missing))}"
            raise UserError(f"{self.config} is not the record of a search: it {lacks}")
        if not isinstance(config.get("acc_predictor_dir", ""), str) or not isinstance(
            config["table"], (str, type(None))
        ):
            raise UserError(f"{self.config}: acc_predictor_dir and table must be paths")
        return config

    def load_space(self) -> SearchSpace:
        """The space that was searched."""
        if self.policy.exists():
            raise UserError(f"{self.path} holds the policy of one network: no space was searched")
        try:
            return space_from_dict(self.load_config()["space"])
        except UserError as error:
            raise UserError(f"{self.config}: {error}") from error

    def load_subnet(self, space: SearchSpace) -> Subnet:
        """The subnet of the `arch` file, checked against the space."""
        if not self.arch.exists():
            raise UserError(f"no experiment at {self.path}: it has no arch file; run search.py first")
        parts = read_json(self.arch)
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, dict) for part in parts)):
            raise UserError(f"{self.arch} must hold a list of two objects, architecture then policy")
        if twice := set(parts[0]) & set(parts[1]):
            raise UserError(f"{self.arch} gives {', '.join(sorted(twice))} in both objects")
        try:
            return subnet_from_spec(space, {**parts[0], **parts[1]})
        except UserError as error:
            raise UserError(f"{self.arch}: {error}") from error


def get_experiment(name: str, folder: Path | None = None) -> Experiment:
    """The experiment in a folder, or else exps/NAME; UserError where the name is a path."""
    if folder is None and (name != Path(name).name or name in ("", "..")):
        raise UserError(f"--exp_name {name!r} must be a plain name; give a path with --exp_dir")
    return Experiment(folder or Path("exps") / name)
