"""The sequential baseline: pruning, mid channels within budgets, and whole runs, killed and continued."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from example_spaces import WIDE
from hypothesis import given, settings
from hypothesis import strategies as st

from apq.bit_widths import all_bits
from apq.errors import UserError
from apq.files import write_json
from apq.genes import largest_subnet, sample, subnets_of
from apq.presets import DIGITS, GLYPHS, QFA_MBV3
from apq.resume import Resume
from dataset.splits import make_loader
from elastic_nn.networks.subnet import build_subnet
from elastic_nn.networks.supernet_file import load_supernet
from elastic_nn.quantizers import FLOAT
from elastic_nn.training.engine import TrainConfig, evaluate
from elastic_nn.training.recipes import RECIPES
from elastic_nn.training.session import Session
from lut import table
from lut.bitfusion import BitFusion
from lut.costs import UNITS, layer_quantity
from lut.traced import traced_layers
from methods.evolution.evolution_finder import EvolutionConfig
from methods.search.settings import AgentConfig
from methods.sequential.architecture import at_highest_bits, in_full_space, search_architecture, subnet_cost
from methods.sequential.config import ArchitectureSearch, SequentialConfig, Split, WidthSearch
from methods.sequential.pipeline import STATE, Parts, asked_of, run_sequential
from methods.sequential.pruning import FloatSubnet, prune_channels, search_widths
from methods.sequential.widths import width_environment, widths_of, with_widths
from utils.latency_predictor import LatencyPredictor
from utils.predictor_files import load_predictor

CPU, MODELS = torch.device("cpu"), ROOT / "models/digits"
COST_MODEL = BitFusion()
LARGEST = largest_subnet(DIGITS)


def random_net(space, seed):
    """A subnet at the highest bits, its float network with random statistics, and a generator."""
    rng = np.random.default_rng(seed)
    subnet = subnets_of(space, sample(space, 1, rng))[0]
    subnet = replace(subnet, bits=largest_subnet(space).bits)
    torch.manual_seed(seed)
    net = build_subnet(space, subnet, FLOAT)
    for key, tensor in net.state_dict().items():
        if "norm" in key and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return subnet, net.eval(), rng


def some_widths(space, subnet, rng):
    pairs = zip(subnet.running_slots(space), widths_of(space, subnet), strict=True)
    return np.array([rng.choice([mid for mid in slot.mid_channels if mid <= now]) for slot, now in pairs])


@pytest.mark.parametrize("space", [DIGITS, WIDE], ids=lambda space: space.name)
@pytest.mark.parametrize("seed", range(3))
def test_channels_without_weights_can_be_removed(space, seed):
    subnet, net, rng = random_net(space, seed)
    images = torch.randn(4, space.in_channels, subnet.resolution, subnet.resolution)
    whole = FloatSubnet(net=net, space=space, subnet=subnet)
    same = prune_channels(whole, widths_of(space, subnet))
    assert same.subnet == subnet
    assert all(torch.equal(tensor, same.net.state_dict()[key]) for key, tensor in net.state_dict().items())

    widths = some_widths(space, subnet, rng)
    kept = []
    with torch.no_grad():
        for i, mid in enumerate(widths, start=1):
            weight = net.blocks[i].project.conv.weight
            dead = torch.from_numpy(rng.permutation(weight.size(1))[mid:])
            weight[:, dead] = 0
            kept.append([c for c in range(weight.size(1)) if c not in dead])
        found = prune_channels(whole, widths)
        pruned = found.net
        torch.testing.assert_close(pruned(images), net(images), rtol=1e-4, atol=1e-4)
    assert widths_of(space, found.subnet).tolist() == widths.tolist()
    fresh = build_subnet(space, found.subnet, FLOAT).state_dict()
    assert {key: t.shape for key, t in fresh.items()} == {key: t.shape for key, t in pruned.state_dict().items()}
    for i, channels in enumerate(kept, start=1):  # in their old order
        assert torch.equal(pruned.blocks[i].depthwise.conv.weight, net.blocks[i].depthwise.conv.weight[channels])


def test_surgery_refuses_what_it_cannot_do():
    subnet, net, _ = random_net(DIGITS, 0)
    whole = FloatSubnet(net=net, space=DIGITS, subnet=subnet)
    for wrong in (1, 8):
        with pytest.raises(UserError, match=r"only pruned|cannot have|only be pruned"):
            prune_channels(whole, widths_of(DIGITS, subnet) + wrong)
    with pytest.raises(UserError, match="cannot have 7 channels, only 8, 16"):
        prune_channels(whole, widths_of(DIGITS, subnet) * 0 + 7)


@pytest.mark.parametrize("quantity", UNITS)
def test_all_stages_count_alike(quantity):
    """Gene tables, the list of layers and the traced network give the same cost."""
    for seed in range(3):
        subnet, net, _ = random_net(GLYPHS, seed)
        traced = layer_quantity(traced_layers(net, subnet.resolution, in_channels=1), quantity, COST_MODEL).sum()
        assert subnet_cost(GLYPHS, subnet, quantity, COST_MODEL) == pytest.approx(traced)
        assert LatencyPredictor(type=quantity, scope="full", space=GLYPHS).predict_lat(subnet) == pytest.approx(traced)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(UNITS)), st.floats(0, 1))
def test_widths_are_legal_and_within_the_budget(seed, quantity, tightness):
    rng = np.random.default_rng(seed)
    subnet = replace(subnets_of(DIGITS, sample(DIGITS, 1, rng))[0], bits=LARGEST.bits)
    free = width_environment(DIGITS, subnet, quantity, COST_MODEL, 1e18)
    present = widths_of(DIGITS, subnet)
    assert free.decide(np.ones(len(present))).tolist() == present.tolist()
    smallest = free.decide(np.zeros(len(present)))
    high, low = subnet_cost(DIGITS, subnet, quantity, COST_MODEL), free.cost_of_widths(smallest)
    budget = low + tightness * (high - low)
    environment = replace(free, budget=budget * (1 + 1e-9))
    widths = environment.decide(rng.random(len(present)))
    assert (widths <= present).all()
    narrowed = with_widths(DIGITS, subnet, widths)  # or it raises
    cost = subnet_cost(DIGITS, narrowed, quantity, COST_MODEL)
    assert cost == pytest.approx(environment.cost_of_widths(widths))
    assert cost <= environment.budget * (1 + 1e-9)


def test_the_last_blocks_are_narrowed_first():
    free = width_environment(DIGITS, LARGEST, "bitops", COST_MODEL, 1e18)
    present = widths_of(DIGITS, LARGEST)
    budget = free.cost_of_widths(present - np.array([0, 0, 0, 0, 0, 0, 8, 8]))
    assert replace(free, budget=budget).decide(np.ones(8)).tolist() == (present - [0, 0, 0, 0, 0, 0, 8, 8]).tolist()
    features = free.features()
    assert features.shape == (8, 8)
    assert features.min() == 0
    assert features.max() == 1


def test_budget_below_the_narrowest_network_names_its_cost():
    free = width_environment(DIGITS, LARGEST, "latency", COST_MODEL, 1e18)
    with pytest.raises(UserError, match=r"0\.001 ms is below the narrowest .* needs 0\.\d+ ms"):
        replace(free, budget=0.001)
    lowest = free.cost_of_widths(free.decide(np.zeros(8)))
    assert (replace(free, budget=lowest).decide(np.ones(8)) <= widths_of(DIGITS, LARGEST)).all()


def test_architectures_have_the_highest_bits_and_respect_the_budget():
    accuracy = load_predictor(MODELS / "acc.pt", DIGITS).fast()
    evolution = EvolutionConfig(population=30, generations=10)
    cheapest = LatencyPredictor(type="latency", scope="full", space=at_highest_bits(DIGITS)).cheapest()[0]
    for budget in (1.05 * cheapest, 2 * cheapest, 1e6):
        config = ArchitectureSearch(quantity="latency", budget=budget, evolution=evolution)
        found = search_architecture(DIGITS, accuracy, COST_MODEL, config)
        assert found.subnet.bits == LARGEST.bits
        assert found.cost <= budget
        assert found.cost == pytest.approx(subnet_cost(DIGITS, found.subnet, "latency", COST_MODEL))
    with pytest.raises(UserError, match=f"cheapest subnet .* needs {cheapest:.6g} ms"):
        search_architecture(DIGITS, accuracy, COST_MODEL, replace(config, budget=0.9 * cheapest))


def test_an_agent_prunes(few):
    supernet, _ = load_supernet(MODELS / "supernet.pt")
    supernet.activate(LARGEST)
    net = supernet.get_active_subnet()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    budget = 0.8 * subnet_cost(DIGITS, LARGEST, "bitops", COST_MODEL)
    agent = AgentConfig(episodes=6, warmup=3, hidden=16)
    config = WidthSearch(quantity="bitops", budget=budget, recalibration_images=64, val_images=50, agent=agent)
    whole = FloatSubnet(net=net, space=DIGITS, subnet=LARGEST)
    pruned, found, original = search_widths(whole, COST_MODEL, config, Session(splits=few, device=CPU))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert len(found.history) == 6
    assert all(record["cost"] <= budget for record in found.history)
    assert found.record["reward"] == pytest.approx(10 * (found.record["accuracy"] - original))
    assert widths_of(DIGITS, pruned.subnet).tolist() == found.candidate.tolist()
    top1 = evaluate(pruned.net, make_loader(few.val.thinned(50), 256), CPU).top1
    assert top1 == found.record["accuracy"]  # cut out, it is the network that was scored


CONFIG = SequentialConfig(
    quantity="bitops",  # of the smallest networks here fewer bits hardly make a faster one
    split=Split(constraint=8e6),
    evolution=EvolutionConfig(population=20, generations=3),
    pruning_agent=AgentConfig(episodes=5, warmup=2, hidden=16),
    recalibration_images=64,
    finetune=TrainConfig(epochs=2, lr=0.02),
    bits_agent=AgentConfig(episodes=4, warmup=2, hidden=16),
    train_images=64,
    val_images=50,
)


def digits_parts(cost_model=COST_MODEL):
    supernet, _ = load_supernet(MODELS / "supernet.pt")
    predictor = load_predictor(MODELS / "acc.pt", DIGITS)
    return Parts(supernet=supernet, predictor=predictor, recipe=RECIPES["tiny"], cost_model=cost_model)


def whole_way(few, folder, config=CONFIG, restart=False, cost_model=COST_MODEL):
    parts = digits_parts(cost_model)
    session = Session(splits=few, device=CPU)
    resume = Resume(folder / STATE, asked_of(config, parts, session), "search", restart)
    return run_sequential(config, parts, session, resume)


def same(one, other):
    assert one.spec == other.spec
    assert one.bits.policy == other.bits.policy
    assert one.bits.original == other.bits.original
    assert one.stages == other.stages
    for stage in ("architecture", "widths"):
        assert getattr(one, stage).history == getattr(other, stage).history
    assert one.bits.history == other.bits.history
    ours, theirs = one.net.state_dict(), other.net.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return whole_way(few, folder), folder


def test_every_stage_keeps_its_budget(whole):
    result, folder = whole
    assert [facts.stage for facts in result.stages] == ["architecture", "pruning", "bits"]
    assert all(0 < facts.cost <= facts.budget for facts in result.stages)
    assert all(0 <= facts.accuracy <= 1 for facts in result.stages)
    assert result.stages[-1].budget == CONFIG.split.constraint
    assert {file.name for file in folder.iterdir()} == {STATE, "bits.state.pt"}


@pytest.mark.parametrize(("stage", "after"), [
    ("sequential", 1),  # with an architecture
    ("pruning", 2),
    ("finetune", 1),
    ("finetune", 2),  # trained, but not yet a result
    ("sequential", 2),  # pruned
    ("bits", 2),
])  # fmt: skip
def test_killed_run_ends_the_same(few, whole, tmp_path, monkeypatch, stage, after):
    calls, save = [], Resume.save

    def then_die(self, state):
        save(self, state)
        calls.append(self.file.name)
        if calls.count(f"{stage}.state.pt") == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resume, "save", then_die)
        with pytest.raises(KeyboardInterrupt):
            whole_way(few, tmp_path)
    same(whole_way(few, tmp_path), whole[0])
    assert {file.name for file in tmp_path.iterdir()} == {STATE, "bits.state.pt"}


def test_runs_are_not_mixed(few, whole, tmp_path):
    result, folder = whole
    other = replace(CONFIG, bits_agent=replace(CONFIG.bits_agent, episodes=3))
    differs = r"sequential\.state\.pt belongs to another search: config\.bits_agent\.episodes was 4, is 3"
    with pytest.raises(UserError, match=differs):
        whole_way(few, folder, other)
    same(whole_way(few, folder), result)
    dropped = shutil.copytree(folder, tmp_path / "dropped")
    assert len(whole_way(few, dropped, other, restart=True).bits.history) == 3


def test_a_hopeless_last_budget_leaves_no_state(few, tmp_path):
    hopeless = replace(CONFIG, min_bit=8)  # no bits to save
    with pytest.raises(UserError, match=r"are within the budget: the budget of .* raise --preserve_ratio"):
        whole_way(few, tmp_path, hopeless)
    assert not list(tmp_path.iterdir())


def test_bits_without_a_price_are_not_a_matter_of_the_budget(few, tmp_path):
    """The error names the layer. The states stay."""
    write_json(tmp_path / "own.json", table.build(DIGITS, COST_MODEL))  # of the space's bits, 4 to 8, some of them
    own = replace(CONFIG, quantity="latency", split=Split(constraint=0.06), min_bit=2)
    with pytest.raises(UserError, match=r"^the cost table lacks layer \d+ \(.*\) at some of its bits$"):
        whole_way(few, tmp_path, own, cost_model=table.load(tmp_path / "own.json"))
    assert (tmp_path / STATE).exists()


def test_a_search_depends_on_the_rows_of_its_table(few, tmp_path):
    file, session, asked = tmp_path / "own.json", Session(splits=few, device=CPU), []
    for latency in (2, 3):
        write_json(file, {"head": {"latency": latency, "energy": 1}})
        asked.append(asked_of(CONFIG, digits_parts(table.load(file)), session))
    assert asked[0]["cost"] == asked[1]["cost"]
    assert asked[0]["prices"] != asked[1]["prices"]


def test_a_split_shares_the_way():
    split = Split(constraint=0.6, prune_ratio=0.5, preserve_ratio=0.6)
    assert (split.pruning_budget, split.architecture_budget) == pytest.approx((1.0, 2.0))
    assert replace(split, architecture=3.0).architecture_budget == 3.0
    for wrong in ({"constraint": 0}, {"prune_ratio": 1.5}, {"preserve_ratio": 0}, {"architecture": -1}):
        with pytest.raises(UserError, match=r"positive|above 0"):
            Split(**{**asdict(split), **wrong})


def test_architectures_of_the_highest_bits_are_those_of_the_space():
    narrow = at_highest_bits(QFA_MBV3)
    assert all_bits(narrow) == {4, 8}  # the classifier has 8
    genes = sample(narrow, 20, np.random.default_rng(0))
    for one, other in zip(subnets_of(narrow, genes), subnets_of(QFA_MBV3, in_full_space(QFA_MBV3, genes)), strict=True):
        assert one == other
