"""Settings of searches by an agent. This module does not import torch, so that command lines start fast."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from apq.errors import UserError
from apq.files import Record
from apq.layers import FIXED_BITS
from apq.policy import QUANTIZERS
from elastic_nn.training.recipe import REWARDS, TrainConfig

METRICS = ("top1", "top5")
STEPS = ("free", "all")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of an agent (`methods.search.agent.Agent`). UserError where one is out of range.

    The defaults are HAQ's (rl_quantize.py and lib/rl/ddpg.py of its code).

    Episodes are counted from 0, and those up to `warmup` act at random: one more than its number, as in HAQ's code.
    After them each action is drawn from a truncated normal distribution around the actor's output. Its width is
    `noise * noise_decay` in the first of these episodes, and every episode multiplies it by `noise_decay`. The agent
    learns from the latest `replay_episodes`, with `updates` gradient steps for each action of an episode.
    `reward_momentum` is the weight of a new batch in the moving average of rewards.
    """

    episodes: int = 600
    warmup: int = 20
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    target_rate: float = 0.01
    discount: float = 1.0
    batch_size: int = 64
    hidden: int = 300
    noise: float = 0.5
    noise_decay: float = 0.99
    replay_episodes: int = 128
    updates: int = 1
    reward_momentum: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.episodes, self.batch_size, self.hidden, self.replay_episodes) < 1:
            raise UserError("episodes, batch size, hidden units and replayed episodes of an agent must be at least 1")
        if min(self.warmup, self.updates) < 0:
            raise UserError("warm-up episodes and updates cannot be negative")
        rates = self.actor_lr, self.critic_lr, self.noise
        if not (all(0 < rate < math.inf for rate in rates) and 0 <= self.discount <= 1):
            raise UserError("learning rates and noise must be positive, the discount from 0 to 1")
        if not (0 < self.target_rate <= 1 and 0 < self.noise_decay <= 1 and 0 < self.reward_momentum <= 1):
            raise UserError("target rate, decay of the noise and reward momentum must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class BitSearch:
    """Settings of a search for the bits of every layer of one network. UserError where one is out of range.

    Attributes:
        quantizer, min_bit, max_bit: name of the quantizer, and the range of its bits.
        quantity, budget: the cost that is limited, and the limit.
        ratio: the budget as a fraction of the reference cost, where `budget` is None. The reference is the cost of the
            8-bit network or, where weights alone are quantized, the bytes of the 32-bit weights.
        keep_ends: whether the first and last layer keep 8 bits.
        image_bits: bits at which the first layer's input is priced: 8, or 7 as in HAQ's code, by mistake.
        train_images, val_images: images that an episode trains on (an epoch), and is scored on.
        reward: "validation" or "training": the images on which an episode is rewarded (`ShortFinetune.reward`).
        metric: "top1" or "top5": the accuracy that is rewarded.
        steps: "free": the agent chooses the bits that are not fixed. "all": it also takes steps for fixed bits, in
            vain, as in HAQ's code.
        is_pruned: whether zero weights stay zero; where weights alone are quantized they have no size.
    """

    quantizer: str
    quantity: str
    ratio: float
    min_bit: int
    max_bit: int
    keep_ends: bool
    train_images: int
    val_images: int
    budget: float | None = None
    image_bits: int = FIXED_BITS
    reward: str = REWARDS[0]
    metric: str = METRICS[0]
    steps: str = STEPS[0]
    is_pruned: bool = False

    def __post_init__(self) -> None:
        known = QUANTIZERS[self.quantizer]
        if not known.fewest <= self.min_bit <= self.max_bit <= known.most:
            raise UserError(
                f"{self.quantizer} bits must be from {known.fewest} to {known.most}, "
                f"not {self.min_bit} to {self.max_bit}"
            )
        if self.keep_ends and FIXED_BITS not in known.bits:
            raise UserError(f"{self.quantizer} has no {FIXED_BITS} bits for the first and last layer: --no-keep_ends")
        if not 0 < self.ratio <= 1:
            raise UserError(f"the budget must be a fraction above 0 and at most 1, not {self.ratio:g}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise UserError(f"the budget must be a positive number, not {self.budget:g}")
        if not known.priced and self.quantity != "size":
            raise UserError(
                f"{self.quantizer} weights compute in floating point: their budget is a size, give --type size"
            )
        if self.train_images < 2 or self.val_images < 1:
            raise UserError("an episode needs at least two training images and one validation image")
        for what, known in (("reward", REWARDS), ("metric", METRICS), ("steps", STEPS)):
            if (value := getattr(self, what)) not in known:
                raise UserError(f"{what} must be one of {', '.join(known)}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class PolicySearch:
    """All settings of a search by an agent: the bits, the agent, and the training in an episode."""

    bits: BitSearch
    agent: AgentConfig
    train: TrainConfig

    def record(self) -> Record:
        """The settings as plain data."""
        return {"search": asdict(self.bits), "agent": asdict(self.agent), "train": asdict(self.train)}
