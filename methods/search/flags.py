"""The flags of HAQ; those that its code has keep their names."""

from __future__ import annotations

import argparse
from pathlib import Path

from apq.cli import at_least
from apq.errors import UserError
from apq.layers import FIXED_BITS
from apq.policy import QUANTIZERS
from elastic_nn.training.recipe import Recipe
from methods.search.evolution_finder import EvolutionConfig
from methods.search.settings import AgentConfig, BitSearch

DEFAULT_RATIO = {"linear": 0.6, "kmeans": 0.1}  # HAQ's, of the 8-bit cost and of the 32-bit size


def add_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Add the flags of the quantized network; returns their names."""
    group = parser.add_argument_group("--mode ddpg")
    group.add_argument("--model", metavar="NAME|exps/NAME", help="network of models/NAME, or that of an experiment")
    group.add_argument("--weights", type=Path, help="file of --model's weights (default: models/NAME/model.pt)")
    group.add_argument(
        "--policy",
        type=Path,
        metavar="FILE[#/POINTER]",
        help="bits to take instead of searching: a JSON list, HAQ's strategy, or what the pointer leads to in the file",
    )
    group.add_argument(
        "--keep_ends",
        action=argparse.BooleanOptionalAction,
        help="leave first and last layer at 8 bits (default: yes, of k-means no, as published)",
    )
    group.add_argument(
        "--image_bits",
        type=int,
        choices=(7, 8),
        default=FIXED_BITS,
        help="bits that the first layer's input is priced at (7: as HAQ's code does)",
    )
    return {action.dest for action in group._group_actions}


def add_bit_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Add the flags that say which bits are searched; returns their names."""
    group = parser.add_argument_group("bits, of --mode ddpg and sequential")
    group.add_argument("--quantizer", choices=tuple(QUANTIZERS), default="linear", help="how values are quantized")
    group.add_argument(
        "--preserve_ratio",
        type=float,
        help="budget, share of the 8-bit cost, of k-means of the 32-bit weights "
        "(default: 0.6, of k-means 0.1; or give --constraint)",
    )
    group.add_argument("--min_bit", type=int, help="fewest bits (default: 2, of k-means 1; sequential: the space's)")
    group.add_argument("--max_bit", type=int, help="most bits (default: 8; sequential: the space's)")
    group.add_argument(
        "--finetune_images", type=at_least(2), help="images that an episode trains on (default: the recipe's)"
    )
    group.add_argument(
        "--val_images", type=at_least(1), help="images that an episode is scored on (default: the recipe's)"
    )
    return {action.dest for action in group._group_actions}


def add_agent_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Add the flags of the agent; returns their names."""
    agent, group = AgentConfig(), parser.add_argument_group("agent, of --mode ddpg and sequential")
    group.add_argument("--train_episode", type=at_least(1), default=agent.episodes, help="episodes")
    group.add_argument("--warmup", type=at_least(0), default=agent.warmup, help="episodes that act at random, first")
    group.add_argument("--lr_a", type=float, default=agent.actor_lr, help="learning rate of the actor")
    group.add_argument("--lr_c", type=float, default=agent.critic_lr, help="learning rate of the critic")
    group.add_argument("--tau", type=float, default=agent.target_rate, help="step of the target networks' average")
    group.add_argument("--discount", type=float, default=agent.discount, help="weight of the value of the next step")
    group.add_argument("--bsize", type=at_least(1), default=agent.batch_size, help="steps in a batch")
    group.add_argument("--hidden", type=at_least(1), default=agent.hidden, help="units of each of the two layers")
    group.add_argument("--init_delta", type=float, default=agent.noise, help="width of the exploration after warm-up")
    group.add_argument("--delta_decay", type=float, default=agent.noise_decay, help="its decay an episode")
    group.add_argument("--rmsize", type=at_least(1), default=agent.replay_episodes, help="episodes remembered")
    group.add_argument("--n_update", type=at_least(0), default=agent.updates, help="gradient steps for each action")
    group.add_argument("--moving_alpha", type=float, default=agent.reward_momentum, help="step of the reward's average")
    return {action.dest for action in group._group_actions}


def agent_config(args: argparse.Namespace) -> AgentConfig:
    """The agent that the flags describe."""
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


def bit_search(args: argparse.Namespace, recipe: Recipe) -> BitSearch:
    """The search that the flags describe."""
    kmeans = args.quantizer == "kmeans"
    if args.constraint is not None and args.preserve_ratio is not None:
        raise UserError("give one budget: --constraint or --preserve_ratio")
    if kmeans and (args.table is not None or args.image_bits != FIXED_BITS):
        raise UserError("k-means weights have no price on an accelerator: leave --table and --image_bits out")
    return BitSearch(
        quantizer=args.quantizer,
        quantity=args.type or ("size" if kmeans else "latency"),
        ratio=DEFAULT_RATIO[args.quantizer] if args.preserve_ratio is None else args.preserve_ratio,
        budget=args.constraint,
        min_bit=QUANTIZERS[args.quantizer][0] if args.min_bit is None else args.min_bit,
        max_bit=QUANTIZERS[args.quantizer][1] if args.max_bit is None else args.max_bit,
        keep_ends=not kmeans if args.keep_ends is None else args.keep_ends,
        image_bits=args.image_bits,
        train_images=args.finetune_images or recipe.episode_images,
        val_images=args.val_images or recipe.episode_val_images,
    )


def evolution_config(args: argparse.Namespace) -> EvolutionConfig:
    """The settings that the flags give."""
    names = ("population", "generations", "parent_ratio", "mutation_prob", "mutation_ratio", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return EvolutionConfig(**given)
