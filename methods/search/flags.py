"""Flags that several modes of `search.py` share, and the settings in them.

The `build_parser` of a mode starts with `mode_parser` and adds flags. This module does not import torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from apq.cli import (
    LARGEST,
    MOST_BATCH,
    MOST_CANDIDATES,
    MOST_HIDDEN,
    MOST_LR,
    Parser,
    above_0,
    add_common_flags,
    at_least,
)
from apq.model_folder import DEFAULT_MODELS
from apq.policy import LINEAR, QUANTIZERS
from apq.space import SCOPES
from lut.cost_model import add_cost_flags
from lut.costs import UNITS
from methods.search.evolution_finder import EVOLUTIONS, EvolutionConfig
from methods.search.settings import AgentConfig

T = TypeVar("T")
MOST_RISK = 1e3
MOST_ROUNDS = 1000
BIT_QUANTITIES = tuple(name for name in UNITS if name != "flops")  # MACs are the same at any bits


def mode_parser(mode: str, description: str) -> Parser:
    """The parser of `search.py --mode MODE`, with the flags that all modes share."""
    parser = Parser(description, prog=f"search.py --mode {mode}")
    group = parser.add_argument_group("flags of all modes")
    group.add_argument("--exp_name", default="test", help="name of the experiment: its folder is exps/NAME")
    group.add_argument("--exp_dir", type=Path, help="folder of the experiment (default: exps/EXP_NAME)")
    group.add_argument("--overwrite", action="store_true", help="replace an experiment that exists")
    add_cost_flags(group, "the published BitFusion")
    add_common_flags(group)
    return parser


def add_budget_flags(parser: Parser, *, quantities: Sequence[str] = tuple(UNITS), default: str | None) -> None:
    """Add --constraint and --type. Without a `default` the default is latency, or size for k-means."""
    parser.add_argument("--constraint", type=above_0(LARGEST), help="budget, in the unit of --type")
    units = ", ".join(f"{name}: {UNITS[name]}" for name in quantities)
    shown = default or "latency, for k-means size"
    parser.add_argument(
        "--type",
        choices=tuple(quantities),
        default=default,
        help=f"quantity that the budget limits, and its unit: {units} (default: {shown})",
    )


def add_models_flag(parser: Parser) -> None:
    """Add --acc_predictor_dir."""
    parser.add_argument(
        "--acc_predictor_dir", type=Path, default=DEFAULT_MODELS, help="folder of the predictors and the supernet"
    )


def add_risk_flag(parser: Parser) -> None:
    """Add --risk."""
    parser.add_argument(
        "--risk",
        type=above_0(MOST_RISK),
        metavar="R",
        help="rank by predicted accuracy less R times its standard deviation, of a kernel predictor or over "
        "members (default: 0)",
    )


def add_scope_flag(parser: Parser) -> None:
    """Add --scope."""
    parser.add_argument("--scope", choices=SCOPES, help="layers that the budget counts (default: the space's)")


def add_refine_flag(group: argparse._ArgumentGroup) -> None:
    """Add --refine."""
    group.add_argument(
        "--refine",
        type=at_least(1, MOST_ROUNDS),
        metavar="ROUNDS",
        help="search in rounds: after each one some of the --measure N subnets are measured, as the pairs were, and "
        "the predictor learns from them",
    )


def add_image_flags(parser: Parser) -> None:
    """Add --data and --recipe."""
    from elastic_nn.training.recipes import RECIPES

    parser.add_argument("--data", type=Path, help="own images: train/CLASS, val/CLASS (default: of earlier steps)")
    parser.add_argument("--recipe", help=f"training recipe: {', '.join(RECIPES)} (default: the network's)")


def add_evolution_flags(parser: Parser) -> None:
    """Add the flags of evolutionary search."""
    group, default = parser.add_argument_group("evolution"), EvolutionConfig()
    add_preset_flag(group, "evolution", EVOLUTIONS)
    # No defaults here: a flag that is left out is as the preset says.
    for name, kind, meaning in (
        ("population", at_least(0, MOST_CANDIDATES), "candidates a generation"),
        ("generations", int, "generations to run"),
        ("parent_ratio", float, "fraction kept as parents"),
        ("mutation_prob", float, "probability of each gene"),
        ("mutation_ratio", float, "fraction of mutants"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {getattr(default, name)})")


def add_preset_flag(group: argparse._ArgumentGroup, flag: str, presets: Mapping[str, object]) -> None:
    """Add the flag that names all settings of a search together. Flags of single settings change them."""
    group.add_argument(f"--{flag}", choices=tuple(presets), help="settings that other flags change (default: default)")


def preset_of(args: argparse.Namespace, flag: str, presets: Mapping[str, T], names: Sequence[str]) -> T:
    """The settings that the flag names, with those of the flags `names` that are given, and the seed."""
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return replace(presets[getattr(args, flag) or "default"], seed=args.seed, **given)


def evolution_config(args: argparse.Namespace) -> EvolutionConfig:
    """The settings in the flags of `add_evolution_flags`."""
    names = ("population", "generations", "parent_ratio", "mutation_prob", "mutation_ratio")
    return preset_of(args, "evolution", EVOLUTIONS, names)


def add_bit_flags(parser: Parser, *, ratio: str, fewest: str, most: str) -> None:
    """Add the flags of a search for bits. `ratio` is the help of --preserve_ratio; `fewest` and `most` are defaults."""
    group = parser.add_argument_group("bits")
    group.add_argument("--quantizer", choices=tuple(QUANTIZERS), default=LINEAR, help="quantizer of all layers")
    group.add_argument("--preserve_ratio", type=float, help=ratio)
    group.add_argument("--min_bit", type=int, help=f"fewest bits (default: {fewest})")
    group.add_argument("--max_bit", type=int, help=f"most bits (default: {most})")
    group.add_argument(
        "--finetune_images", type=at_least(2), help="training images of an episode (default: the recipe's)"
    )
    group.add_argument("--val_images", type=at_least(1), help="validation images of an episode (default: the recipe's)")


def add_agent_flags(parser: Parser) -> None:
    """Add the flags of the agent, under the names of HAQ's code where it has them."""
    agent, group = AgentConfig(), parser.add_argument_group("agent")
    group.add_argument("--train_episode", type=at_least(1), default=agent.episodes, help="episodes")
    group.add_argument(
        "--warmup", type=at_least(0), default=agent.warmup, help="last episode, from 0, that acts at random"
    )
    group.add_argument("--lr_a", type=above_0(MOST_LR), default=agent.actor_lr, help="learning rate of the actor")
    group.add_argument("--lr_c", type=above_0(MOST_LR), default=agent.critic_lr, help="learning rate of the critic")
    group.add_argument(
        "--tau", type=float, default=agent.target_rate, help="weight of new weights in the target networks"
    )
    group.add_argument("--discount", type=float, default=agent.discount, help="weight of the next step's value")
    group.add_argument("--bsize", type=at_least(1, MOST_BATCH), default=agent.batch_size, help="steps in a batch")
    group.add_argument(
        "--hidden", type=at_least(1, MOST_HIDDEN), default=agent.hidden, help="width of each of the two hidden layers"
    )
    group.add_argument("--init_delta", type=float, default=agent.noise, help="exploration noise after warm-up")
    group.add_argument("--delta_decay", type=float, default=agent.noise_decay, help="decay of the noise an episode")
    group.add_argument(
        "--rmsize", type=at_least(1), default=agent.replay_episodes, help="episodes in the replay buffer"
    )
    group.add_argument("--n_update", type=at_least(0), default=agent.updates, help="gradient steps for each action")
    group.add_argument(
        "--moving_alpha", type=float, default=agent.reward_momentum, help="weight of new rewards in their average"
    )


def agent_config(args: argparse.Namespace) -> AgentConfig:
    """The settings in the flags of `add_agent_flags`."""
    return AgentConfig(
        episodes=args.train_episode,
        warmup=args.warmup,
        actor_lr=args.lr_a,
        critic_lr=args.lr_c,
        target_rate=args.tau,
        discount=args.discount,
        batch_size=args.bsize,
        hidden=args.hidden,
        noise=args.init_delta,
        noise_decay=args.delta_decay,
        replay_episodes=args.rmsize,
        updates=args.n_update,
        reward_momentum=args.moving_alpha,
        seed=args.seed,
    )
