"""Settings of searches by an agent, as data. This module imports no torch, so that command lines start fast."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from apq.errors import UserError
from apq.files import Record
from apq.layers import FIXED_BITS
from apq.policy import QUANTIZERS
from elastic_nn.training.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of an agent (`methods.search.agent.Agent`); the defaults are HAQ's.

    The first `warmup` episodes act at random. After that each action is drawn from a truncated normal of width `noise`
    around the actor's; every episode multiplies the width by `noise_decay`. The agent learns from the last
    `replay_episodes`, with `updates` gradient steps per action of an episode. `reward_momentum` is the weight of a new
    batch in the moving average of rewards.
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
            raise UserError("an agent needs episodes, batch size, hidden units and replayed episodes of at least 1")
        if min(self.warmup, self.updates) < 0:
            raise UserError("warm-up episodes and updates cannot be negative")
        rates = self.actor_lr, self.critic_lr, self.noise
        if not (all(0 < rate < math.inf for rate in rates) and 0 <= self.discount <= 1):
            raise UserError("learning rates and exploration must be positive, the discount from 0 to 1")
        if not (0 < self.target_rate <= 1 and 0 < self.noise_decay <= 1 and 0 < self.reward_momentum <= 1):
            raise UserError("target average, decay of exploration and weight of new rewards lie above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class BitSearch:
    """Settings of a search for the bits of every layer of one network.

    Bits of `quantizer` go from `min_bit` to `max_bit`. Without a `budget` it is `ratio` times the reference: the
    `quantity` of the 8-bit network or, for k-means, the bytes of the 32-bit weights. `keep_ends` keeps the first and
    last layer at 8 bits. The first layer's input is priced at `image_bits`: 8, or 7, which the published HAQ code reads
    by mistake. An episode trains on `train_images` and is scored on `val_images`.
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

    def __post_init__(self) -> None:
        fewest, most = QUANTIZERS[self.quantizer]
        if not fewest <= self.min_bit <= self.max_bit <= most:
            raise UserError(f"{self.quantizer} bits lie from {fewest} to {most}, not {self.min_bit} to {self.max_bit}")
        if not self.ratio > 0 or (self.budget is not None and not self.budget > 0):
            raise UserError(f"the budget must be positive, not {self.budget or self.ratio}")
        if self.quantizer == "kmeans" and self.quantity != "size":
            raise UserError("k-means weights are computed with in floating point: their budget is a size (--type size)")
        if self.train_images < 2 or self.val_images < 1:
            raise UserError("an episode needs at least two training images and one validation image")


@dataclass(frozen=True, kw_only=True)
class PolicySearch:
    """All settings of a search by an agent: the bits, the agent, and how an episode trains (for one epoch)."""

    bits: BitSearch
    agent: AgentConfig
    train: TrainConfig

    def record(self) -> Record:
        """What a continued search must repeat, as plain data."""
        return {"search": asdict(self.bits), "agent": asdict(self.agent), "train": asdict(self.train)}
