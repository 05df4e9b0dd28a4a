"""HAQ through the scripts: search of bits, given policies, finetune, report, error messages."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import script
from few_images import N_TEST
from PIL import Image

from apq.errors import UserError
from apq.experiment import Experiment
from apq.files import read_json, read_jsonl, write_json
from apq.layers import ConvLayer
from apq.model import ModelSpec
from elastic_nn.modules.quant_layers import quantized_layers
from elastic_nn.networks.model_file import load_model, save_model
from elastic_nn.networks.named_models import use_elastic_norms
from elastic_nn.networks.policy_file import load_finetuned_policy
from elastic_nn.training.policies import PolicyScorer
from elastic_nn.training.recipes import get_recipe
from elastic_nn.training.session import Session
from lut.bitfusion import BitFusion
from lut.table import layer_key
from methods.search.bit_search import make_task, search_bits
from methods.search.settings import AgentConfig, BitSearch, PolicySearch

search, quant_aware, report, train = (script(name) for name in ("search", "quant_aware", "test", "train"))
QUICK = ["--mode", "ddpg", "--recipe", "tiny", "--train_episode", "6", "--warmup", "2", "--hidden", "16"]
MODEL = ["--model", "mobilenet_v2_small"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    """A folder with a network trained by the tiny recipe, and one experiment of each quantizer."""
    root = tmp_path_factory.mktemp("haq")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("APQ_CACHE", str(root / "cache"))
        train([*MODEL, "--images", "digits", "--recipe", "tiny", "--epochs", "2"])
        for quantizer in ("linear", "kmeans"):
            search([*QUICK, *MODEL, "--quantizer", quantizer, "--exp_name", quantizer])
            quant_aware(["--exp_name", quantizer, "--epochs", "1"])
    return root


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def printed(capsys, call, *words):
    capsys.readouterr()
    call([*words])
    return capsys.readouterr().out


@pytest.mark.parametrize(("quantizer", "ratio"), [("linear", 0.6), ("kmeans", 0.1)])
def test_search_keeps_its_budget(here, capsys, quantizer, ratio):
    folder = here / "exps" / quantizer
    names = {"acc", "bits.png", "checkpoint", "config.json", "history.jsonl", "history.png", "lat", "made_by.json"}
    assert {path.name for path in folder.iterdir()} == {*names, "model.pt", "policy.json"}
    config = read_json(folder / "config.json")
    assert config["ratio"] <= ratio
    assert f"<= {config['budget']:g}" in printed(capsys, report, "--exp_dir", f"exps/{quantizer}")
    assert read_json(folder / "lat") == [config["cost"]]
    history = read_jsonl(folder / "history.jsonl")
    assert len(history) == 6
    assert config["episode"] in history
    assert config["episode"]["reward"] == max(record["reward"] for record in history)
    strategy = read_json(folder / "policy.json")["strategy"]
    if quantizer == "linear":
        assert strategy[0] == [8, -1]
        assert strategy[-1] == [8, 8]
    again = json.loads(
        printed(
            capsys, search, *QUICK, *MODEL, "--quantizer", quantizer, "--exp_name", "again", "--overwrite", "--json"
        )
    )
    assert again["policy"] == strategy


def test_report(here, capsys):
    text = printed(capsys, report, "--exp_dir", "exps/linear", "--device", "cpu")
    title = f"linear policy of mobilenet_v2_small, {N_TEST} test images"
    for words in (title, "top-5", "of 32 bits", "all 8 bits", "bits.png"):
        assert words in text
    shown = json.loads(printed(capsys, report, "--exp_dir", "exps/linear", "--json"))
    config = read_json(here / "exps/linear/config.json")
    assert shown["costs"]["this policy"]["latency_ms"] == pytest.approx(config["cost"])
    ratio = shown["costs"]["this policy"]["latency_ms"] / shown["costs"]["all 8 bits"]["latency_ms"]
    assert ratio == pytest.approx(config["ratio"])
    weights = [w for w, _ in shown["policy"]]
    layers = read_json(here / "exps/linear/policy.json")["layers"]
    sizes = [
        layer["out_channels"] * layer["in_channels"] // layer["groups"] * layer["kernel_size"] ** 2 for layer in layers
    ]
    assert shown["size_ratio"] == pytest.approx(sum(map(int.__mul__, weights, sizes)) / 32 / sum(sizes))

    text = printed(capsys, report, "--exp_dir", "exps/kmeans")
    assert "kmeans policy" in text
    assert "latency" not in text
    shown = json.loads(printed(capsys, report, "--exp_dir", "exps/kmeans", "--json"))
    assert shown["size_ratio"] == pytest.approx(read_json(here / "exps/kmeans/config.json")["ratio"])


def test_given_policy(here, capsys):
    strategy = [[8, -1], *[[4, 6]] * 21, [8, 8]]
    write_json(here / "policy", {"strategy": strategy})
    words = ["--mode", "ddpg", *MODEL, "--recipe", "tiny", "--policy", "policy", "--overwrite"]
    shown = json.loads(printed(capsys, search, *words, "--exp_name", "given", "--json"))
    assert shown["policy"] == strategy
    assert shown["episode"] is None
    quant_aware(["--exp_name", "given", "--epochs", "1"])
    assert json.loads(printed(capsys, report, "--exp_dir", "exps/given", "--json"))["policy"] == strategy
    both = [json.loads(printed(capsys, search, *words, "--image_bits", bits, "--json"))["cost"] for bits in "78"]
    assert both[0] < both[1]

    rows = [f"{i},{w},{a},{(i + 1) * w * a}" for i in range(23) for w in (2, 4, 8) for a in (2, 6, 8)]
    (here / "table.csv").write_text("\n".join(rows[9:]))  # of all layers but the first
    cost = sum((i + 1) * 4 * 6 for i in range(1, 22)) + 23 * 8 * 8
    shown = json.loads(printed(capsys, search, *words, "--table", "table.csv", "--exp_name", "given", "--json"))
    assert shown["cost"] == cost
    quant_aware(["--exp_name", "given", "--epochs", "1"])
    assert f"latency by table.csv: {cost}, " in printed(capsys, report, "--exp_dir", "exps/given")
    write_json(here / "policy", {"strategy": [[8, -1], *[[4, 5]] * 21, [8, 8]]})
    with pytest.raises(UserError, match=r"lacks layer 1 at its bits, \[4, 5\]"):
        search([*words, "--table", "table.csv"])

    write_json(here / "policy", strategy[1:])
    with pytest.raises(UserError, match="policy: the policy has bits for 22 layers, the network has 23"):
        search(words)


def test_a_table_of_the_searched_bits_is_enough(here, capsys):
    """Rows of 2 to 8 bits, from BitFusion: the search ends as it does with BitFusion."""
    given = [ConvLayer(**row) for row in read_json(here / "exps/linear/policy.json")["layers"]]
    pairs = [(w, a) for w in range(2, 9) for a in range(2, 9)]
    layers = [replace(layer, w_bits=w, a_bits=a) for layer in given for w, a in pairs]
    rows = dict(zip(map(layer_key, layers), BitFusion().price(layers).tolist(), strict=True))
    write_json(here / "own.json", {key: {"latency": ms, "energy": mj} for key, (ms, mj) in rows.items()})
    write_json(here / "kind.json", {"kind": "table", "path": "own.json"})
    for priced in (["--table", "own.json"], ["--config", "kind.json"]):
        words = [*QUICK, *MODEL, *priced, "--exp_name", "own", "--overwrite", "--json"]
        shown = json.loads(printed(capsys, search, *words))
        assert shown["policy"] == read_json(here / "exps/linear/policy.json")["strategy"]
        assert shown["priced_by"] == "table own.json"
    del rows[layer_key(replace(given[5], w_bits=3, a_bits=4))]
    write_json(here / "own.json", {key: {"latency": ms, "energy": mj} for key, (ms, mj) in rows.items()})
    with pytest.raises(UserError, match=rf"lacks layer 5 \({given[5].name}\) at some of its bits"):
        search(words)


def test_published_policies(here, golden, capsys):
    """The two published policies on networks of their architectures, with their published costs."""
    cases = golden("haq.json")
    kmeans, linear = cases["kmeans_policies"][0], cases["linear_policies"][0]
    folder, rng = here / "folder", np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(12):
                Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(
                    folder / part / name / f"{i}.png"
                )
    for case, name, quantizer in ((kmeans, "resnet50", "kmeans"), (linear, "mobilenet_v2", "linear")):
        torch.save(torchvision.models.get_model(name, num_classes=2).state_dict(), here / "weights.pth")
        file = f"{golden('haq_latency_table.csv').with_name('haq.json')}#/{quantizer}_policies/0"
        words = ["--mode", "ddpg", "--model", name, "--weights", "weights.pth", "--data", "folder"]
        words += ["--quantizer", quantizer, "--policy", file, "--overwrite", "--json"]
        if quantizer == "linear":
            words += ["--table", str(golden("haq_latency_table.csv")), "--image_bits", "7"]
        shown = json.loads(printed(capsys, search, *words))
        assert read_json(here / "exps/test/config.json")["recipe"] == f"haq-imagenet-{quantizer}"
        if quantizer == "linear":
            priced = range(0, 53, 2)  # the table has the even layers
            assert shown["cost"] == sum(case["per_layer_cost"][i] for i in priced)
        else:
            assert shown["ratio"] == pytest.approx(case["ratio"], abs=6e-3)  # two classes instead of a thousand


def test_networks_of_experiments(here, capsys):
    train(["--space", "digits", "--recipe", "tiny"])
    search(["--prepare", "acc", "--recipe", "tiny"])
    search(["--prepare", "acc_quant", "--acc_train_sample", "12", "--recipe", "tiny"])
    search(["--constraint", "0.05", "--generations", "3", "--population", "20", "--exp_name", "found"])
    quant_aware(["--exp_name", "found", "--recipe", "tiny"])
    search([*QUICK, "--model", "exps/found", "--preserve_ratio", "0.9", "--exp_name", "bits"])
    quant_aware(["--exp_name", "bits", "--epochs", "1"])
    shown = json.loads(printed(capsys, report, "--exp_dir", "exps/bits", "--json"))
    assert shown["costs"]["this policy"]["latency_ms"] <= 0.9 * shown["costs"]["all 8 bits"]["latency_ms"]
    assert shown["model"] == "exps/found"

    quick = ["--prune_episode", "4", "--prune_epochs", "1", "--population", "20", "--generations", "3"]
    search([*QUICK, "--mode", "sequential", "--constraint", "0.06", *quick, "--exp_name", "one-by-one"])
    assert {path.name for path in (here / "exps/one-by-one").iterdir()} >= {"policy.json", "model.pt", "bits.png"}
    assert not list((here / "exps/one-by-one").glob("*state*"))
    quant_aware(["--exp_name", "one-by-one", "--epochs", "1"])
    shown = json.loads(printed(capsys, report, "--exp_dir", "exps/one-by-one", "--json"))
    assert shown["costs"]["this policy"]["latency_ms"] <= 0.06


def test_a_pruned_network(here, capsys):
    """From its weights to the report: zero weights stay zero and have no size. Episodes are rewarded as asked."""
    net, spec, images = load_model(here / "models/mobilenet_v2_small/model.pt")
    with torch.no_grad():
        for weight in (parameter for parameter in net.parameters() if parameter.ndim > 1):
            weight[weight.abs() < weight.abs().median()] = 0
    save_model(here / "pruned.pt", spec, net.state_dict(), images)
    words = [*QUICK, *MODEL, "--weights", "pruned.pt", "--quantizer", "kmeans", "--exp_name", "pruned", "--is_pruned"]
    search([*words, "--train_episode", "3", "--reward", "training", "--use_top5", "--finetune_epoch", "2"])
    quant_aware(["--exp_name", "pruned", "--epochs", "1"])
    config, history = read_json(here / "exps/pruned/config.json"), read_jsonl(here / "exps/pruned/history.jsonl")
    assert len(history) == 3
    assert config["search"]["metric"] == "top5"
    left = config["weights_left"]
    bits = read_json(here / "exps/pruned/policy.json")["strategy"]
    ratio = sum(map(int.__mul__, bits, left)) / 32 / sum(left)
    assert config["ratio"] == pytest.approx(ratio)
    shown = json.loads(printed(capsys, report, "--exp_dir", "exps/pruned", "--json"))
    assert shown["size_ratio"] == pytest.approx(ratio)
    found = load_finetuned_policy(Experiment(here / "exps/pruned")).net
    for name, layer in quantized_layers(found).items():
        assert not layer.weight_quant(layer.weight)[net.get_submodule(name).weight == 0].any()


def test_resumes_after_an_interruption(here, monkeypatch):
    monkeypatch.setattr("methods.ddpg.search.SAVE_SECONDS", 0)
    words = [*QUICK, *MODEL, "--exp_name", "killed"]
    whole, scored = PolicyScorer.accuracy, []

    def interrupted(self, policy):
        scored.append(policy)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return whole(self, policy)

    monkeypatch.setattr(PolicyScorer, "accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(words)
    assert (here / "exps/killed/agent.state.pt").exists()
    with pytest.raises(
        UserError, match=r"agent\.state\.pt belongs to another search: agent\.seed was 0, is 1; give --overwrite"
    ):
        search([*words, "--seed", "1"])
    monkeypatch.setattr(PolicyScorer, "accuracy", whole)
    search(words)
    for name in ("policy.json", "history.jsonl"):
        assert (here / "exps/killed" / name).read_text() == (here / "exps/linear" / name).read_text()
    configs = [read_json(here / "exps" / name / "config.json") for name in ("killed", "linear")]
    assert {*configs[1].pop("files")} - {*configs[0].pop("files")} == {"acc", "checkpoint/model_best.pth.tar"}
    assert configs[0] == configs[1]  # the other one is finetuned, too
    assert not (here / "exps/killed/agent.state.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*QUICK], "needs --model"),
        ([*QUICK, "--model", "resnet18"], "no weights at models/resnet18/model.pt"),
        ([*QUICK, *MODEL, "--quantizer", "kmeans", "--type", "latency"], "floating point"),
        ([*QUICK, *MODEL, "--preserve_ratio", "0.1"], r"below the cheapest policy, which needs 0\.05"),
        ([*QUICK, *MODEL, "--constraint", "1", "--preserve_ratio", "0.5"], "one budget"),
        ([*QUICK, *MODEL, "--min_bit", "1"], "linear bits must be from 2 to 8"),
        ([*QUICK, *MODEL, "--exp_name", "linear"], "exists; choose another"),
        (["--mode", "ddpg", *MODEL, "--policy", "nowhere.json"], "nowhere.json"),
        ([*QUICK, *MODEL, "--policy", "nowhere.json"], "leave the budget and the agent's flags out"),
        (["--mode", "ddpg", *MODEL, "--policy", "x", "--constraint", "1"], "leave the budget"),
        ([*QUICK, "--model", "mobilenet_v2_smal"], "nearest: mobilenet_v2_small"),
        ([*QUICK, "--model", "models/mobilenet_v2_small"], "by its name, mobilenet_v2_small"),
        ([*QUICK, *MODEL, "--quantizer", "kmeans", "--image_bits", "7"], "no cost on an accelerator"),
        ([*QUICK, *MODEL, "--lr_c", "nan"], "must be positive"),
        ([*QUICK, *MODEL, "--finetune_gamma", "1.5"], "must be positive and at most 1"),
        (["--mode", "ddpg", *MODEL, "--recipe", "tiny", "--policy", "x", "--use_top5"], "leave the flags of episodes"),
        ([*QUICK, *MODEL, "--population", "3"], r"unrecognized arguments: --population 3 .*--mode ddpg --help"),
        ([*MODEL, "--constraint", "1"], r"unrecognized arguments: --model .*search.py --help"),
        ([*QUICK, "--model", "exps/linear"], "holds the policy"),
        ([*QUICK, "--model", "exps/nowhere"], "exps/nowhere"),
    ],
)
def test_mistakes(here, words, message):
    name = [] if "--exp_name" in words else ["--exp_name", "none"]
    with pytest.raises(UserError, match=message):
        search([*words, *name])
    assert not (here / "exps/none").exists()


def test_finetune_of_a_policy_refuses_a_supernet(here):
    with pytest.raises(UserError, match="leave --supernet out"):
        quant_aware(["--exp_name", "linear", "--overwrite", "--supernet", "x.pt"])
    with pytest.raises(UserError, match="has the quantizer of its policy: leave --quantizer out"):
        quant_aware(["--exp_name", "linear", "--overwrite", "--quantizer", "linear-published"])


def test_network_of_ones_own(few):
    """As the README does it for any module."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, 2, 1, groups=4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )
    use_elastic_norms(net)
    spec = ModelSpec(name="mine", dataset="digits", in_channels=1, n_classes=10, resolution=32)
    task = make_task(net, spec, "linear", "bitops", BitFusion())
    settings = {"min_bit": 2, "max_bit": 8, "keep_ends": True, "train_images": 64, "val_images": 50}
    config = BitSearch(quantizer="linear", quantity="bitops", ratio=0.8, **settings)
    agent = AgentConfig(episodes=4, warmup=1, hidden=8)
    plan = PolicySearch(bits=config, agent=agent, train=get_recipe("tiny", spec).episode)
    found = search_bits(task, plan, Session(splits=few, device=torch.device("cpu")))
    assert found.policy.names == ("0", "3", "6")
    assert found.policy.bits[0] == (8, -1)
    assert found.episode["cost"] <= 0.8 * task.costs.reference
