"""Time what an episode of HAQ's agent takes apart from the evaluation of the network.

"wait" is the time of an episode minus that of its evaluation: acting, lowering bits until they fit the budget ("budget
wall"), pricing, records, and learning where it takes longer than the evaluation, beside which it runs. The small
MobileNetV2 is evaluated as in a search, by a short finetune and validation on glyphs. The other columns are parts of
the agent, timed on their own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from apq.cli import Parser, run, table
from apq.layers import ConvLayer
from apq.model import ModelSpec
from apq.model_folder import ModelFolder
from apq.policy import layer_names
from benchmarks.machine import describe
from dataset import load_splits
from elastic_nn.networks.model_file import load_model
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bit_costs import linear_costs
from lut.bitfusion import BitFusion
from lut.traced import traced_layers
from methods.search.agent import Agent
from methods.search.bit_choices import fixed_bits
from methods.search.bit_environment import BitEnvironment
from methods.search.bit_search import make_scorer, make_task, policy_of_bits
from methods.search.episodes import find
from methods.search.settings import AgentConfig, BitSearch

COST_MODEL = BitFusion()
WARMUP = 5


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--episodes", type=int, default=25, help="episodes to measure")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)  # for the evaluation; the agent learns in its own thread
    net, spec, _ = load_model(ModelFolder(Path("models/mobilenet_v2_small")).model)
    small = traced_layers(net, spec.resolution, in_channels=spec.in_channels)
    rows = [("small MobileNetV2, evaluated", measure(small, args.episodes, evaluation(net, spec)))]
    import torchvision

    full = traced_layers(torchvision.models.mobilenet_v2().to("meta"), 224)
    rows.append(("MobileNetV2 at 224 pixels, 1 s slept", measure(full, args.episodes, lambda bits: time.sleep(1.0))))
    machine = describe()
    if args.json:
        print(json.dumps({**machine, "rows": dict(rows)}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    titles = list(rows[0][1])
    print(table([("", *titles), *((name, *(f"{row[key]:.2f}" for key in titles)) for name, row in rows)]))


def evaluation(net: torch.nn.Module, spec: ModelSpec) -> Callable[[np.ndarray], object]:
    """A function that evaluates one policy in the same way as a search."""
    splits, recipe = load_splits(spec), get_recipe(None, spec)
    task = make_task(net, spec, "linear", "latency", COST_MODEL)
    config = BitSearch(
        quantizer="linear",
        quantity="latency",
        ratio=0.6,
        min_bit=2,
        max_bit=8,
        keep_ends=True,
        train_images=recipe.episode_images,
        val_images=recipe.episode_val_images,
    )
    session = Session(splits=splits, device=torch.device("cpu"))
    scorer = make_scorer(task, config, recipe.episode, session)
    return lambda bits: scorer.accuracy(policy_of_bits(task.layers, "linear", bits))


def measure(layers: list[ConvLayer], n_episodes: int, evaluate: Callable[[np.ndarray], object]) -> dict[str, float]:
    """Median milliseconds of the parts of an episode, after warm-up."""
    n = len(layer_names(layers))
    costs = linear_costs(layers, "latency", COST_MODEL)
    fixed = fixed_bits(n, activations=True, keep_ends=True)
    environment = BitEnvironment(
        layers=layers, costs=costs, budget=0.6 * costs.reference, fixed=fixed, min_bit=2, max_bit=8
    )
    observations = environment.observations()
    evaluations, ends = [], []

    def score(bits: np.ndarray, episode: int) -> tuple[float, dict[str, float]]:
        started = time.perf_counter()
        evaluate(bits)
        evaluations.append(time.perf_counter() - started)
        return float(bits.mean()), {"cost": environment.costs.total(bits)}

    config = AgentConfig(episodes=n_episodes + WARMUP, warmup=WARMUP)
    find(observations, environment.decide, score, config, log=lambda record: ends.append(time.perf_counter()))
    spent = np.diff(ends)[WARMUP:] - np.array(evaluations)[WARMUP + 1 :]

    agent = Agent(observations, config)
    parts = {"acting": [], "budget wall": [], "learning": []}
    for episode in range(WARMUP + 5):
        started = time.perf_counter()
        states, actions = agent.act()
        acted = time.perf_counter()
        environment.decide(actions)
        decided = time.perf_counter()
        agent.observe(states, actions, 0.0)
        agent.learn()
        learned = time.perf_counter()
        if episode > WARMUP:
            for name, seconds in zip(parts, (acted - started, decided - acted, learned - decided), strict=True):
                parts[name].append(seconds)
    medians = {f"{name}, ms": 1e3 * statistics.median(values) for name, values in parts.items()}
    steps = len(observations)
    evaluated = 1e3 * statistics.median(evaluations[WARMUP + 1 :])
    return {
        "actions": steps,
        "evaluation, ms": evaluated,
        "wait, ms": 1e3 * float(np.median(spent)),
        **medians,
        "a gradient step, ms": medians["learning, ms"] / steps,
    }


if __name__ == "__main__":
    run(main)
