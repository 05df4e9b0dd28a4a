"""A folder with every kind of file that the program reads, made by its own commands in seconds: a network of a few
channels, forty images of noise. Also what reads each of these files."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apq.__main__ import facts_of
from apq.experiment import Experiment
from apq.files import read_json, write_json
from apq.genes import genes_of, largest_subnet
from apq.layers import layers_of
from apq.operands import BLOCK_LAYERS, OperandBits
from apq.policy import load_strategy, policy_from_strategy
from apq.presets import QFA_MBV3, get_space
from apq.resume import Resume, State
from apq.search_result import read_policy, read_result
from apq.space import SearchSpace, space_to_dict
from apq.stages import Stage
from dataset.imagenet import image_folder_space, image_folder_splits
from dataset.pairs import PairStore
from dataset.splits import ImageSpec, Splits, TensorImages
from dataset.table import DATASETS, DataSet
from elastic_nn.networks.model_file import load_model
from elastic_nn.networks.policy_file import load_policy_model
from elastic_nn.networks.subnet_file import load_finetuned
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.training.recipe import TrainConfig
from elastic_nn.training.recipes import RECIPES, TINY_RECIPE
from elastic_nn.training.session import ONE_PROCESS
from lut.bitfusion import BitFusion
from lut.cost_model import cost_model_from_flags, recorded_cost_model
from lut.measured import load_measured
from methods.coarse_to_fine.evaluated import open_store
from methods.nsga2.front_records import load_front
from methods.search.archive import Archive
from methods.search.predicted import load_quantized_predictor
from methods.search.refine_task import load_refining
from utils.predictor_files import load_predictor
from utils.qfa import published_of_genes

ROOT = Path(__file__).resolve().parent.parent
SIDE, CLASSES = 16, 4
SPACE = SearchSpace(
    name="few",
    dataset="few",
    in_channels=1,
    n_classes=CLASSES,
    resolutions=(8, SIDE),
    stem_width=8,
    stem_stride=2,
    first_block_width=8,
    stages=(Stage(width=8, stride=2, depths=(1, 2)),),
    head_width=8,
    kernel_sizes=(3, 5),
    ratios=(1.0, 2.0),
    channel_step=8,
    operands=tuple(OperandBits(name=o, layers=BLOCK_LAYERS, operand=o, choices=(4, 8)) for o in "wa"),
)
MODELS, NET = "models/few", "mobilenet_v1_small"
SEARCH = ["--acc_predictor_dir", MODELS]
EVOLUTION = ["--population", "4", "--generations", "1"]
REFINE = ["--refine", "2", "--measure", "2"]
AGENT = ["--train_episode", "2", "--warmup", "1", "--hidden", "4", "--rmsize", "2", "--bsize", "2", "--n_update", "1"]
COMMANDS: dict[str, list[str]] = {  # script and flags, by the name of what they make
    "supernet": ["train.py", "--space", "space.json"],
    "net": ["train.py", "--model", NET, "--images", "few"],
    "acc": ["search.py", "--prepare", "acc", *SEARCH],
    "acc_quant": ["search.py", "--prepare", "acc_quant", *SEARCH],
    "found": ["search.py", *SEARCH, *EVOLUTION, "--constraint", "1", "--exp_name", "found"],
    "front": ["search.py", "--mode", "nsga2", *SEARCH, *EVOLUTION, "--exp_name", "front"],
    "refined": ["search.py", *SEARCH, *EVOLUTION, *REFINE, "--constraint", "1", "--exp_name", "refined"],
    "refined front": ["search.py", "--mode", "nsga2", *SEARCH, *EVOLUTION, *REFINE, "--exp_name", "refined_front"],
    "coarse": [
        *("search.py", "--mode", "coarse_to_fine", *SEARCH, "--n_coarse", "4", "--intervals", "2"),
        *("--n_fine", "1", "--exp_name", "coarse"),
    ],
    "bits": ["search.py", "--mode", "ddpg", "--model", NET, *AGENT, "--preserve_ratio", "0.9", "--exp_name", "bits"],
    "losses": ["search.py", "--mode", "sensitivity", "--model", NET, "--preserve_ratio", "0.9", "--exp_name", "losses"],
    "steps": [
        "search.py",
        "--mode",
        "sequential",
        *SEARCH,
        *EVOLUTION,
        *AGENT,
        "--constraint",
        "1",
        "--exp_name",
        "steps",
    ],
    "tuned": ["quant_aware.py", "--exp_name", "found"],
    "tuned bits": ["quant_aware.py", "--exp_name", "bits"],
    "tested": ["test.py", "--exp_dir", "exps/found"],
    "exported": ["export.py", "--exp_dir", "exps/found", "--check", "8"],
    "table": ["lut", "--space", "space.json", "--out", "table.json"],
    "costs": ["lut", "--model", "exps/found"],
    "shown": ["apq", "space.json"],
    "drawn": ["report.analyse", "diagram", "exps/found"],
    "depths": ["report.analyse", "depths", "exps/coarse"],
    "genes": ["utils.qfa", "genes.json"],
}
MADE_BY = (
    *("supernet", "net", "acc", "acc_quant", "found", "front", "refined", "coarse", "bits", "losses", "tuned"),
    *("tuned bits", "table"),
)


def main_of(script: str) -> Callable[[list[str]], None]:
    """The `main` of a script or of a module with a command line."""
    if not script.endswith(".py"):
        name = script if "." in script else f"{script}.__main__"
        return importlib.import_module(name).main
    spec = importlib.util.spec_from_file_location(f"hostile_{script[:-3]}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    importlib.import_module("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def few_images(spec: ImageSpec) -> Splits:
    """Forty images of noise in four classes, at the spec's channels and largest resolution."""
    rng = torch.Generator().manual_seed(0)
    side = spec.resolutions[-1]
    if spec.n_classes != CLASSES:
        from apq.errors import UserError

        raise UserError(f"there are {CLASSES} classes of noise; {spec.name} has {spec.n_classes}")
    images = torch.randn(40, spec.in_channels, side, side, generator=rng)
    part = TensorImages(images, torch.arange(40) % CLASSES)
    return Splits(train=part, calibration=part, val=part, test=part, source={"dataset": "few"})


def register() -> None:
    """Add the images and their recipe to the tables."""
    train = TrainConfig(epochs=1, lr=0.01, batch_size=20)
    phases = tuple(replace(phase, train=train, epoch_images=20) for phase in TINY_RECIPE.phases)
    images = {"recalibration_images": 20, "episode_images": 20, "episode_val_images": 20}
    RECIPES["few"] = replace(
        TINY_RECIPE,
        name="few",
        phases=phases,
        pair_finetune=train,
        finetune=train,
        pairs_float=12,
        pairs_quant=10,
        predictor_hidden=16,
        **images,
    )
    DATASETS["few"] = DataSet(name="few", in_channels=1, n_classes=CLASSES, side=SIDE, load=few_images, recipe="few")


def make_world() -> None:
    """Fill the current folder."""
    register()
    write_json(Path("space.json"), space_to_dict(SPACE))
    write_json(Path("chip.json"), {"rows": 8, "clock_mhz": 400.0, "max_bits": 8})
    write_json(Path("roof.json"), {"kind": "table", "path": "table.json"})
    write_json(
        Path("genes.json"), published_of_genes(QFA_MBV3, genes_of(QFA_MBV3, [largest_subnet(QFA_MBV3)])).tolist()
    )
    with (
        kept_states(Path("states")),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for name in MADE_BY:
            script, *flags = COMMANDS[name]
            main_of(script)(flags)
    strategy = read_json(Path("exps/bits/policy.json"))["strategy"]
    write_json(Path("strategy.json"), {"strategy": strategy})
    rows = [f"{i},{w},{a},{1 + i + w + a}.5" for i in range(len(strategy)) for w in range(1, 9) for a in range(1, 9)]
    Path("measured.csv").write_text("\n".join(["layer,w_bits,a_bits,cost", *rows]) + "\n")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in "ab":
            folder = Path("images", part, label)
            folder.mkdir(parents=True)
            for i, suffix in enumerate(("png", "jpg", "bmp", "gif", "tif")):
                image = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                image.save(folder / f"{i}.{suffix if suffix != 'gif' else 'webp'}")


@contextlib.contextmanager
def kept_states(folder: Path) -> Iterator[None]:
    """Keep a copy of every state of unfinished work that is removed in the block, with what was asked beside it.

    Those of searches that measure go with their folders, so they are kept when they are saved.
    """
    done, save = Resume.done, Resume.save
    folder.mkdir()

    def keep(self: Resume) -> None:
        if self.file is not None and self.file.exists():
            name = f"{self.file.parent.name}-{self.file.name}"
            shutil.copy(self.file, folder / name)
            (folder / f"{name}.asked").write_text(json.dumps(self.asked, default=str))

    def keep_removed(self: Resume) -> None:
        keep(self)
        done(self)

    def keep_saved(self: Resume, state: State) -> None:
        save(self, state)
        if self.file is not None and self.file.name == "refine.state.pt":
            keep(self)

    Resume.done, Resume.save = keep_removed, keep_saved
    try:
        yield
    finally:
        Resume.done, Resume.save = done, save


@dataclass(frozen=True)
class Format:
    """A file of the world and what reads it. The reader raises UserError for what is wrong with the file."""

    name: str
    file: Path
    read: Callable[[], object]


def formats() -> list[Format]:
    """Every kind of file, with its readers."""
    names_of = ("found", "front", "coarse", "bits", "refined", "losses")
    found, front, coarse, bits, refined, losses = (Experiment(Path("exps") / name) for name in names_of)
    layers = layers_of(SPACE, largest_subnet(SPACE), "full")
    cached = BitFusion()
    pairs = PairStore(Path("dataset/NetInfo/few/acc"))
    quantized = PairStore(Path("dataset/NetInfo/few/acc_quant"))
    archive = Archive(store=quantized.measured(), space=SPACE, made_by=quantized.measured().made_by())
    n_layers = len(read_json(bits.policy)["strategy"])
    names, convs = [f"layer{i}" for i in range(n_layers)], read_policy(bits)[1]
    prices = cached.price(layers)

    def price_again() -> None:
        if not np.array_equal(cached.price(layers), prices):
            raise AssertionError("a damaged cache changed a price")

    pt = [
        Format("supernet", Path(MODELS, "supernet.pt"), lambda: load_supernet(Path(MODELS, "supernet.pt"))),
        Format("predictor", Path(MODELS, "acc.pt"), lambda: load_predictor(Path(MODELS, "acc.pt"))),
        Format(
            "quantized predictor", Path(MODELS, "acc_quant.pt"), lambda: load_predictor(Path(MODELS, "acc_quant.pt"))
        ),
        Format("predictor to refine", Path(MODELS, "acc_quant.pt"), refine_again),
        Format("network", Path("models", NET, "model.pt"), lambda: load_model(Path("models", NET, "model.pt"), NET)),
        Format("plain weights", Path("models", NET, "model.pt"), lambda: load_model(Path("models", NET, "model.pt"))),
        Format("finetuned subnet", found.best_checkpoint, lambda: load_finetuned(found)),
        Format("finetuned policy", bits.best_checkpoint, lambda: load_policy_model(bits.best_checkpoint)),
    ]
    states = [
        Format(f"state {file.name}", file, state_reader(file))
        for file in sorted(Path("states").glob("*.pt*"))
        if file.suffix != ".asked"
    ]
    measured = open_store(coarse, SPACE, {}, rank=0, lenient=False)
    return [
        Format("space", Path("space.json"), lambda: facts_of(get_space("space.json"))),
        Format("arch", found.arch, lambda: found.load_subnet(SPACE)),
        Format("config of a search", found.config, lambda: recorded_cost_model(found).price(layers)),
        Format("config of bits", bits.config, lambda: read_result(bits)),
        Format("cost of a search", found.lat, lambda: read_result(found)),
        Format("history", found.history, lambda: read_result(found)),
        Format("provenance", found.made_by, lambda: read_result(found)),
        Format("front", front.front, lambda: load_front(front)),
        Format("measured subnets", coarse.path / "evaluated.jsonl", lambda: list(measured.journal.records())),
        Format("config of a refined search", refined.config, lambda: read_result(refined)),
        Format("config of bits by sensitivity", losses.config, lambda: read_result(losses)),
        Format("policy", bits.policy, lambda: read_policy(bits)),
        Format(
            "strategy",
            Path("strategy.json"),
            lambda: policy_from_strategy("linear", convs, load_strategy(Path("strategy.json#/strategy"))),
        ),
        Format(
            "accelerator", Path("chip.json"), lambda: cost_model_from_flags(Path("chip.json"), None).price(layers[:3])
        ),
        Format("cost table", Path("table.json"), lambda: cost_model_from_flags(None, Path("table.json")).price(layers)),
        Format("cost model", Path("roof.json"), lambda: cost_model_from_flags(Path("roof.json"), None).price(layers)),
        Format("measured table", Path("measured.csv"), lambda: load_measured(Path("measured.csv"), names, "latency")),
        Format("genes", Path("genes.json"), lambda: main_of("utils.qfa")(["genes.json"])),
        Format("pairs", pairs.path / "pairs.jsonl", lambda: pairs.load(SPACE)),
        Format("record of pairs", pairs.path / "meta.json", lambda: pairs.load(SPACE)),
        Format("pairs to refine", quantized.path / "pairs.jsonl", refine_again),
        Format("record of pairs to refine", quantized.path / "meta.json", refine_again),
        Format("archive", archive.store.path / "pairs.jsonl", archive.load),
        Format("record of an archive", archive.store.path / "meta.json", archive.load),
        Format("cache", cached.cache_file, price_again),
        *pt,
        *states,
        *(
            Format(f"{file.suffix[1:]} image", file, image_reader(file))
            for file in sorted(Path("images/train/a").iterdir())
        ),
    ]


def refine_again() -> None:
    """Read all that a search needs which measures."""
    flags = {"acc_predictor_dir": Path(MODELS), "device": "cpu", "recipe": None, "data": None, "refine": 2}
    load_refining(argparse.Namespace(**flags), load_quantized_predictor(Path(MODELS)), ONE_PROCESS, 2)


def state_reader(file: Path) -> Callable[[], object]:
    """Reads a state as the work that it belongs to does."""
    asked = json.loads(file.with_name(f"{file.name}.asked").read_text())
    return lambda: Resume(file, asked, "work").load()


def image_reader(file: Path) -> Callable[[], object]:
    """Reads an image of the folder `images` as training and validation do."""

    def read() -> None:
        splits = image_folder_splits(image_folder_space(SPACE, Path("images")), Path("images"))
        for dataset in (splits.train, splits.calibration, splits.val):
            for i, place in enumerate(dataset.indices):
                if Path(dataset.folder.samples[place][0]) == file:
                    dataset[i, 0, None]

    return read
