"""Compares an exported file with the network that it was made of, image by image."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from export.graph import Graph
from export.run import run_exactly
from export.runners import CodesRunner, Runner

MOVED = 1e-3  # a logit that differs by more has moved
LEAST_AGREEMENT, MOST_MOVED = 0.995, 0.01  # of images
# A value at the edge between two codes falls on either side, however little sums are rounded. The network and the file
# are each off the exact sums, as the network is in float32 from float64. So twice as many images may move as there, but
# no more than MOST_NOISE: where float64 moves many, it is because of exacter steps, which no file has.
NOISE_FACTOR, MOST_NOISE = 2, 0.05
# A large network moves on every image: of the millions of codes of an EfficientNet-Lite some always lie at an edge, and
# one of them changes others behind it. Where float64 moves more than this share, the size of the differences counts.
ALL_MOVE = 0.5


@dataclass
class Comparison:
    """Logits of a file beside those of the network.

    Attributes:
        agreed, moved: images with the same class, and images of which a logit differs by more than `MOVED`.
        right, right_network: images whose class the file, and the network, tells.
        codes, other_codes: codes that were compared, and those that differ.
        largest: largest difference of a logit.
        summed: sum over images of the largest difference of a logit.
    """

    name: str
    n_images: int = 0
    agreed: int = 0
    moved: int = 0
    right: int = 0
    right_network: int = 0
    codes: int = 0
    other_codes: int = 0
    largest: float = 0.0
    summed: float = 0.0

    def add(self, logits: Tensor, network: Tensor, labels: Tensor) -> None:
        """Count the images of a batch."""
        difference, classes, own = (logits - network).abs().amax(1), logits.argmax(1), network.argmax(1)
        self.n_images += len(labels)
        self.agreed += int((classes == own).sum())
        self.moved += int((~(difference <= MOVED)).sum())  # also where it is no number
        self.right += int((classes == labels).sum())
        self.right_network += int((own == labels).sum())
        self.largest = max(self.largest, difference.max().item())
        self.summed += difference.sum().item()

    def add_codes(self, codes: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
        """Count the codes of a batch. All layers of the reference must be there."""
        for name, expected in reference.items():
            self.codes += expected.numel()
            found = codes.get(name)
            same = found is not None and found.shape == expected.shape
            self.other_codes += int((found.to(expected.dtype) != expected).sum()) if same else expected.numel()

    def share(self, count: int) -> float:
        """A number of images as a share of all."""
        return count / max(self.n_images, 1)

    def fails(self, noise: Comparison) -> str:
        """Why the file is not the network: "" where it is. `noise` compares the network with itself in float64."""
        if self.other_codes:
            return f"{self.other_codes} of {self.codes} codes differ"
        if noise.share(noise.moved) > ALL_MOVE:
            return self._differs_more_than(noise)
        if self.share(self.agreed) < LEAST_AGREEMENT:
            return f"only {self.share(self.agreed):.2%} of the images agree"
        limit = max(MOST_MOVED, min(MOST_NOISE, NOISE_FACTOR * noise.share(noise.moved)))
        if self.share(self.moved) > limit:
            return f"the logits of {self.share(self.moved):.2%} of the images moved, more than {limit:.2%}"
        return ""

    def _differs_more_than(self, noise: Comparison) -> str:
        """Why this is not what rounding does to the network; "" where it is. One image more may change its class."""
        others, limit = self.n_images - self.agreed, NOISE_FACTOR * (noise.n_images - noise.agreed + 1)
        if others > limit and self.share(self.agreed) < LEAST_AGREEMENT:
            return f"{others} images have another class, in float64 {noise.n_images - noise.agreed}"
        mean, usual = (one.summed / max(one.n_images, 1) for one in (self, noise))
        if not mean <= NOISE_FACTOR * usual:  # also where it is no number
            return f"logits move by {mean:.2g} on average, in float64 by {usual:.2g}"
        return ""


@dataclass
class Check:
    """All comparisons of one network. `skipped` names runtimes that were not tried, and why."""

    noise: Comparison = field(default_factory=lambda: Comparison("float64"))
    files: list[Comparison] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@torch.no_grad()
def compare(
    net: nn.Module,
    reference: Graph | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    runners: dict[str, Runner],
    code_runners: dict[str, CodesRunner],
) -> Check:
    """Run a network and files on batches of (images, labels).

    `code_runners` also give the codes of each layer's inputs, which are compared with those of `reference`, a folded
    graph in exact arithmetic.
    """
    found = Check(files=[Comparison(name) for name in (*runners, *code_runners)])
    by_name, precise = {one.name: one for one in found.files}, copy.deepcopy(net).double()
    for images, labels in batches:
        logits = net(images)
        found.noise.add(precise(images.double()).float(), logits, labels)
        for name, run in runners.items():
            by_name[name].add(run(images), logits, labels)
        if not code_runners:
            continue
        expected: dict[str, Tensor] = {}
        run_exactly(reference, images, expected.__setitem__)
        for name, run_codes in code_runners.items():
            own, codes = run_codes(images)
            by_name[name].add(own, logits, labels)
            by_name[name].add_codes(codes, expected)
    return found
