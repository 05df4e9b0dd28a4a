"""Is it better to inherit few bits from more bits (OQA) than to train them from floating point (QAT)?

Both start from the float supernet of the seed and have equally many quantized epochs. Inheritance goes from 5 bits to
4, to 3, to 2, with some epochs at each; its 4-bit supernet has had two times that many, the 2-bit one four times.
Quantization-aware training at the same bits has all these epochs at its own bits, with one schedule of the learning
rate, where each step of inheritance has its own. First convolution and classifier stay in full precision. The largest
and the smallest subnet are tested as they are, with recalibrated BatchNorm. The teacher of a supernet is the largest
network of the one that it started from, as in OQA.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from apq.bit_widths import at_bits
from apq.files import Record
from apq.genes import largest_subnet, smallest_subnet
from apq.model_folder import ModelFolder
from apq.space import FULL_PRECISION, SearchSpace
from benchmarks.evidence_ground import Ground
from benchmarks.evidence_lines import Question, Run
from benchmarks.evidence_setting import Setting
from benchmarks.supernets import trained_once
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import build_supernet
from elastic_nn.quantizers import FLOAT, LSQ
from elastic_nn.training.oqa_recipes import OQA_GLYPHS_2BIT_RECIPE
from elastic_nn.training.pairs import subnet_top1
from elastic_nn.training.progressive_shrinking import SupernetPlan
from elastic_nn.training.recipe import Recipe

METHODS = ("inheritance", "qat")
BITS = (2, 3, 4)
FIRST = 5  # bits of the supernet that inheritance begins with


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Quantized epochs at each step of inheritance, and training images an epoch."""

    epochs: int
    epoch_images: int


SIZES = {"fashion": Sizes(epochs=3, epoch_images=2000), "tiny": Sizes(epochs=1, epoch_images=32)}


def setting_of(setting: Setting) -> Record:
    """What lines record: the setting and the sizes of this question."""
    return {**setting.record(), **asdict(SIZES[setting.name])}


def runs(setting: Setting, seed: int) -> list[Run]:
    """The runs of a seed, from more to fewer bits."""
    return [
        Run(question="oqa", seed=seed, method=method, quantity="bits", limit=bits)
        for bits in reversed(BITS)
        for method in METHODS
    ]


def measure(run: Run, ground: Ground) -> Record:
    """Train the supernet, and those that it starts from, and test its two ends."""
    bits = int(run.limit)
    net = inherited(ground, bits) if run.method == "inheritance" else from_float(ground, bits, steps_to(bits))
    n_images, session = ground.setting.recipe.recalibration_images, ground.session
    figures: Record = {"epochs": SIZES[ground.setting.name].epochs * steps_to(bits)}
    for name, subnet in (("largest", largest_subnet(net.space)), ("smallest", smallest_subnet(net.space))):
        for split, images in (("val", ground.splits.val), ("test", ground.splits.test)):
            figures[f"{name}_{split}_top1"] = subnet_top1(net, subnet, session, images, n_images)
    return figures


def steps_to(bits: int) -> int:
    """How many steps of inheritance have been trained at these bits, the first one included."""
    return FIRST + 1 - bits


def inherited(ground: Ground, bits: int) -> DynamicProxylessNASNets:
    """The supernet of some bits that starts from that of one bit more; the first one from the float supernet."""
    if bits == FIRST:
        return from_float(ground, bits, 1)
    start = inherited(ground, bits + 1)
    return trained(ground, bits, 1, start, f"oqa/inheritance-{bits}")


def from_float(ground: Ground, bits: int, steps: int) -> DynamicProxylessNASNets:
    """The supernet of some bits that starts from the float one, with the epochs of several steps."""
    return trained(ground, bits, steps, float_start(ground), f"oqa/qat-{bits}")


def float_start(ground: Ground) -> DynamicProxylessNASNets:
    """The float supernet of the seed in a space whose ends stay in full precision. The weights are the same."""
    net = build_supernet(with_float_ends(ground.setting.space), FLOAT)
    net.load_state_dict(ground.supernet.state_dict())
    return net


def with_float_ends(space: SearchSpace) -> SearchSpace:
    """The space with first convolution and classifier in full precision: then few bits can be throughout."""
    return replace(space, name=f"oqa-{space.name}", end_bits=FULL_PRECISION, recipe=None)


def trained(
    ground: Ground, bits: int, steps: int, start: DynamicProxylessNASNets, name: str
) -> DynamicProxylessNASNets:
    """A supernet with learned steps, trained by the sandwich rule."""
    space = at_bits(with_float_ends(ground.setting.space), bits)
    plan = SupernetPlan(space=space, recipe=recipe_of(ground.setting, steps), scheme=LSQ, start=start)
    return trained_once(ModelFolder(ground.folder.path / name), plan, ground.session)


def recipe_of(setting: Setting, steps: int) -> Recipe:
    """OQA's sandwich at few bits, in little: epochs for so many steps of inheritance, with one cosine."""
    (phase,), sizes = OQA_GLYPHS_2BIT_RECIPE.phases, SIZES[setting.name]
    train = replace(phase.train, epochs=steps * sizes.epochs)
    phase = replace(phase, train=train, epoch_images=sizes.epoch_images)
    n_images = setting.recipe.recalibration_images
    return replace(OQA_GLYPHS_2BIT_RECIPE, phases=(phase,), recalibration_images=n_images, epoch_val_images=None)


QUESTION = Question(
    name="oqa",
    title="Is it better to inherit few bits than to train them from floating point?",
    methods=METHODS,
    figures=(
        ("largest_test_top1", "largest, test top-1", 100, 2),
        ("smallest_test_top1", "smallest, test top-1", 100, 2),
        ("epochs", "quantized epochs", 1, 0),
    ),
    runs=runs,
    measure=measure,
    setting=setting_of,
)
