"""Every number of the recipes of ImageNet's scale, beside its source, and other published numbers.

The tables are written by hand from the sources. A recipe must equal its table as a whole, so none of its fields can
change alone. Sources are files of the published code, or sections of papers:

- OFA: mit-han-lab/once-for-all, `train_ofa_net.py`, on 32 GPUs of 64 images; ICLR 2020, section 4.1.
- APQ: mit-han-lab/apq; CVPR 2020. OQA: arXiv 2010.04354, appendix A.2. QFA: apple/ml-batchquant.
- HAQ: mit-han-lab/haq. BISMO: EECS-NTNU/bismo.
- "ours": for what a source does not have, or says nothing of.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from apq.policy import QUANTIZERS
from elastic_nn.quantizers import KMEANS
from elastic_nn.training.recipes import RECIPES
from lut.bit_serial import NAMED
from methods.coarse_to_fine.command import build_parser
from methods.coarse_to_fine.finder import CoarseToFineConfig, quotas
from methods.nsga2.config import NSGA2S
from methods.search.evolution_finder import EVOLUTIONS
from methods.search.settings import AgentConfig

NO_CLIP = 1e30
TF_JITTER = {"brightness": 32 / 255, "contrast": 0.0, "saturation": 0.5, "hue": 0.0}  # OFA, QFA: distort_color; OQA
PHASE = {  # as OFA trains: random subnets of the elastic parts, one size of images a batch, a teacher that sees these
    "subnets_per_step": 1,
    "reach": 1.0,
    "sandwich": False,
    "random_ends": False,
    "float_share": 0.0,
    "own_resolutions": False,
    "teacher_follows": False,
    "epoch_images": None,
}
SGD = {  # OFA: optimizer, schedule, label_smoothing, kd_ratio; its training loop clips nothing. APQ, OQA the same
    "momentum": 0.9,
    "nesterov": True,
    "schedule": "cosine",
    "gamma": 1.0,
    "label_smoothing": 0.1,
    "kd_ratio": 1.0,
    "clip_norm": NO_CLIP,
    "clip_together": False,
    "warmup_epochs": 0,
    "warmup_lr": 0.0,
    "dropout": 0.0,
}


def phase(name, elastic, train, **changes):
    return {"name": name, "elastic": elastic, "train": train, **PHASE, **changes}


def ofa(epochs, lr, warmup_epochs=0, warmup_lr=0.0, *, dropout):
    """OFA: n_epochs + warmup_epochs, 32 base_lr, warmup_epochs, base_lr; weight_decay."""
    warmup = {"warmup_epochs": warmup_epochs, "warmup_lr": warmup_lr}
    return {**SGD, "epochs": epochs, "lr": lr, "batch_size": 2048, "weight_decay": 3e-5, **warmup, "dropout": dropout}


def ofa_phases(dropout):
    depth, width = ("ks", "d"), ("ks", "d", "e")
    middle = 2 / 3  # of three choices: depths 3, 4 and expansions 4, 6 (depth_list, expand_list of phase 1)
    return (
        # Section 4.1; warm-up of 5 epochs from 0: defaults of DistributedRunManager.train
        phase("largest", (), ofa(180, 2.6, 5, 0.0, dropout=dropout)),
        phase("kernel", ("ks",), ofa(120 + 5, 0.96, 5, 3e-2, dropout=dropout)),
        # subnets_per_step: dynamic_batch_size
        phase("depth-1", depth, ofa(25, 0.08, dropout=dropout), subnets_per_step=2, reach=middle),
        phase("depth-2", depth, ofa(120 + 5, 0.24, 5, 7.5e-3, dropout=dropout), subnets_per_step=2),
        phase("width-1", width, ofa(25, 0.08, dropout=dropout), subnets_per_step=4, reach=middle),
        phase("width-2", width, ofa(120 + 5, 0.24, 5, 7.5e-3, dropout=dropout), subnets_per_step=4),
    )


def apq(epochs):
    """APQ: quant_aware.py (init_lr, train_batch_size), ImagenetRunConfig (weight_decay, label_smoothing)."""
    return {**SGD, "epochs": epochs, "lr": 1e-3, "batch_size": 256, "weight_decay": 4e-5}


def oqa(epochs, lr):
    """OQA, "Quantization aware training", "Knowledge distillation"."""
    return {**SGD, "epochs": epochs, "lr": lr, "batch_size": 1024, "weight_decay": 3e-5, "dropout": 0.1}


def oqa_sandwich(epochs, lr):
    """OQA, "OQA procedure", step 1: four models a step, and all that is sampled."""
    parts = {"subnets_per_step": 4, "sandwich": True, "own_resolutions": True}
    return phase("sandwich", ("resolution", "ks", "d", "e"), oqa(epochs, lr), **parts)


def qfa(name, epochs, float_share):
    """QFA: main.py, get_args (on 32 GPUs: README); qfa/elastic_nn/training/progressive_shrinking.py (clipping)."""
    train = {**SGD, "epochs": epochs + 5, "lr": 32 * 2.5e-3, "batch_size": 32 * 64, "weight_decay": 3e-5}
    train |= {"warmup_epochs": 5, "warmup_lr": 2.5e-3, "dropout": 0.1, "clip_norm": 500.0, "clip_together": True}
    parts = {"sandwich": True, "random_ends": True, "own_resolutions": True, "teacher_follows": True}
    elastic = ("resolution", "ks", "d", "e", "bits")
    return phase(name, elastic, train, subnets_per_step=6, float_share=float_share, **parts)


def haq(epochs, lr, batch_size, weight_decay, **changes):
    """HAQ: optim.SGD of finetune.py, pretrain.py and lib/env: no Nesterov, smoothing, clipping."""
    plain = {**SGD, "nesterov": False, "label_smoothing": 0.0}
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "weight_decay": weight_decay}
    return {**plain, **settings, **changes}


def haq_episode(batch_size):
    """HAQ: rl_quantize.py (finetune_epoch, _lr, _gamma; data_bsize of run/*_search.sh), reset() of lib/env."""
    return haq(1, 1e-3, batch_size, 4e-5, schedule="exponential", gamma=0.8)


APQ = {
    "name": "apq-imagenet",
    "phases": ofa_phases(dropout=0.0),  # APQ: dropout_rate of quant_aware.py
    "pair_finetune": apq(1),  # ours, at the rate of the finetune
    "finetune": apq(30),  # APQ: quant_aware.py
    "recalibration_images": 2000,  # APQ, OFA: reset_running_statistics
    "pairs_float": 80_000,  # CVPR 2020, section 4
    "pairs_quant": 5_000,  # CVPR 2020, section 4
    "episode_images": 20_000,  # HAQ: rl_quantize.py, train_size
    "episode_val_images": 10_000,  # HAQ: rl_quantize.py, val_size
    "pair_epoch_images": 256_000,  # ours
    "epoch_val_images": None,
    "predictor": "mlp",  # APQ, section 3.2
    "predictor_hidden": 400,  # APQ: utils/accuracy_predictor.py
    "quantizer": "linear-published",  # APQ: imagenet_codebase/utils/quantize_utils.py
    "supernet_quantizer": "batchquant",  # ours: APQ has none
    "pair_strata": None,
    "pair_outliers": None,
    "color_jitter": TF_JITTER,  # APQ: ImagenetRunConfig, distort_color
    "episode_finetune": None,
    "reward": "validation",
}
OQA_FLOAT = {
    **APQ,
    "name": "oqa-imagenet-float",
    "phases": ofa_phases(dropout=0.1),  # OFA: dropout
    "recalibration_images": 4096,  # OQA, section 3.4
    "epoch_val_images": 10_000,  # OFA: valid_size; OQA, section 3.3
}
LARGEST = phase("largest", (), oqa(150, 0.04), own_resolutions=True)  # OQA, step 0
OQA = {
    **OQA_FLOAT,
    "name": "oqa-imagenet",
    "phases": (LARGEST, oqa_sandwich(200, 0.02)),  # OQA, step 1
    "finetune": oqa(25, 0.0016),  # OQA, "OQA subnet finetuning"
}
QFA = {
    **OQA,
    "name": "qfa-imagenet",
    "phases": (qfa("bits and float", 60, 1 / 4), qfa("bits", 120, 0.0)),  # of bits_list 2, 3, 4, 32; then 2, 3, 4
    "recalibration_images": 64 * 30,  # QFA: reset_running_statistics
    "pairs_quant": 16_000,  # NeurIPS 2021, section 3.4
    "pair_strata": {"full_resolution": 0.4, "full_depth": 0.3, "one_bit_width": 0.3},  # QFA: collect_network_info.py
    "pair_outliers": {  # QFA: nsgaii_search.py
        "distances": (0.55, 0.4, 0.4, 0.4),
        "neighbours": 5,
        "flops_unit": 1e6,
    },
    "predictor_hidden": 600,  # QFA: nsgaii_search.py
    "supernet_quantizer": "batchquant-published",
}
HAQ_KMEANS = {
    **APQ,
    "name": "haq-imagenet-kmeans",
    "phases": (phase("largest", (), haq(150, 0.05, 256, 4e-5)),),  # HAQ: run/run_pretrain.sh
    "pair_finetune": haq(1, 1e-3, 256, 4e-5),  # ours: HAQ has no pairs
    "finetune": haq(100, 0.01, 256, 1e-5),  # HAQ: run/run_kmeans_quantize_finetune.sh; finetune.py, weight-decay
    "pair_epoch_images": None,
    "color_jitter": None,  # HAQ: lib/utils/data_utils.py
    "episode_finetune": haq_episode(256),
    "reward": "validation",  # HAQ: lib/env/quantize_env.py
}
HAQ_LINEAR = {
    **HAQ_KMEANS,
    "name": "haq-imagenet-linear",
    "finetune": haq(30, 0.01, 256, 4e-5),  # HAQ: run/run_linear_quantize_finetune.sh
    "episode_finetune": haq_episode(128),
    "reward": "training",  # HAQ: lib/env/linear_quantize_env.py
}
PUBLISHED = (
    APQ,
    OQA_FLOAT,
    OQA,
    {**OQA, "name": "oqa-imagenet-3bit", "phases": (oqa_sandwich(25, 0.0016),)},  # OQA, step 2
    {**OQA, "name": "oqa-imagenet-2bit", "phases": (oqa_sandwich(120, 0.0256),)},  # OQA, step 3
    QFA,
    HAQ_KMEANS,
    HAQ_LINEAR,
)


def test_the_tables_are_of_all_recipes_of_imagenet():
    assert {recipe["name"] for recipe in PUBLISHED} == {name for name in RECIPES if "imagenet" in name}


@pytest.mark.parametrize("expected", PUBLISHED, ids=lambda recipe: recipe["name"])
def test_every_number_of_a_recipe(expected):
    recipe = RECIPES[expected["name"]]
    assert asdict(recipe) == expected
    episode = expected["episode_finetune"] or {**expected["pair_finetune"], "epochs": 1}
    assert asdict(recipe.episode) == episode


def test_haqs_agent():
    """HAQ: defaults of rl_quantize.py, and moving_alpha of lib/rl/ddpg.py."""
    assert asdict(AgentConfig()) == {
        "episodes": 600,
        "warmup": 20,
        "actor_lr": 1e-4,
        "critic_lr": 1e-3,
        "target_rate": 0.01,
        "discount": 1.0,
        "batch_size": 64,
        "hidden": 300,
        "noise": 0.5,
        "noise_decay": 0.99,
        "replay_episodes": 128,
        "updates": 1,
        "reward_momentum": 0.5,
        "seed": 0,
    }


def test_haqs_bits():
    """HAQ: --preserve_ratio, --min_bit and --max_bit of rl_quantize.py, and of run/run_linear_quantize_search.sh."""
    kmeans, linear = QUANTIZERS["kmeans"], QUANTIZERS["linear-published"]
    assert (kmeans.ratio, kmeans.fewest, kmeans.most) == (0.1, 1, 8)
    assert (linear.fewest, linear.most) == (2, 8)


def test_iterations_of_haqs_kmeans():
    """HAQ: max_iter of finetune.py, and of step() in lib/env/quantize_env.py."""
    assert KMEANS.weight().max_iter == 50
    assert KMEANS.quick().weight().max_iter == 3


def test_haqs_accelerators():
    """Cloud: fitted to HAQ's table. Edge: BISMO's README (size, clock), PYNQZ1Params (ports), Makefile (LMEM, RMEM)."""
    shared = {"word_bits": 256, "buffer_words": 1024, "clock_mhz": 200.0, "max_bits": 8}
    cloud = {"batch": 16, "rows": 16, "columns": 16, "port_bits": 256, **shared}
    edge = {"batch": 1, "rows": 8, "columns": 8, "port_bits": 64, **shared}
    assert {name: asdict(model) for name, model in NAMED.items()} == {
        "bit-serial-cloud": cloud,
        "bit-serial-edge": edge,
    }


def test_oqas_intervals():
    """OQA, section 3.3: 10,000 subnets from 50 to 300 M of MACs, 2,000 in every 50 M. The flag has no default."""
    paper = CoarseToFineConfig(flops_min=50e6, flops_max=300e6, n_coarse=10_000)
    np.testing.assert_allclose(np.diff(paper.edges), 50e6)
    assert quotas(paper.n_coarse, paper.intervals).tolist() == [2000] * 5
    assert build_parser().parse_args([]).intervals is None


def test_published_evolutions():
    """APQ: run_evolution_search of methods/evolution/evolution_finder.py; QFA: main of nsgaii_search.py."""
    apq, qfa = asdict(EVOLUTIONS["published"]), asdict(NSGA2S["published"])
    assert apq == {
        "population": 100,
        "generations": 500,
        "parent_ratio": 0.25,
        "mutation_prob": 0.1,
        "mutation_ratio": 0.5,
        "seed": 0,
        "patience": None,
        "max_rounds": 20,
    }
    assert qfa == {
        "population": 500,
        "generations": 1000,
        "crossover_prob": 0.007,
        "mutation_prob": 0.02,
        "seed": 0,
    }
