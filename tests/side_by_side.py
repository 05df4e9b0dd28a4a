"""Runs scripts side by side, each in a process of its own, for tests/test_concurrency.py.

Imports everything once and then forks, so that a run costs little more than its work. Images are few, accuracies of
pairs made up, pictures empty and trainings of predictors short: what is tested is who writes what. Reads lines
`[[script, word, ...], ...]`; a line is one round. Answers each with a line `[[exit code, stdout, stderr], ...]`. A line
with one run is run here, so that what it imports is there for all later ones.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import script

import elastic_nn.training.experiment_finetune
import elastic_nn.training.found_subnet
import elastic_nn.training.model_training
import elastic_nn.training.pairs
import methods.evolution.search
import methods.prepare.predictor
import report.experiment_report
from apq.cli import run
from apq.files import atomic_open
from dataset import load_splits
from dataset.splits import Splits, TensorImages

MAINS = {name: script(name) for name in ("search", "train", "quant_aware", "test")}
LOADERS = (
    elastic_nn.training.experiment_finetune,
    elastic_nn.training.found_subnet,
    elastic_nn.training.model_training,
    methods.prepare.predictor,
    report.experiment_report,
)
N_IMAGES = 24
loaded = {}  # images by data set and sides


def few(spec, data=None, *rest, **named):
    """A few of the images."""
    key = (spec.dataset, tuple(spec.resolutions))
    if key not in loaded:
        whole = load_splits(spec, data)
        parts = (whole.train, whole.calibration, whole.val, whole.test)
        cut = [TensorImages(part.images[:N_IMAGES], part.labels[:N_IMAGES], part.augment) for part in parts]
        loaded[key] = Splits(*cut, source=whole.source)
    return loaded[key]


def work(words, start, out, err):
    """The life of one run, in its own process. It begins when the other end of `start` is closed."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [f"{words[0]}.py", *words[1:]]
    os.read(start, 1)
    try:
        run(lambda argv: MAINS[words[0]](words[1:]))
    except SystemExit as ended:
        return ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def side_by_side(runs):
    """[exit code, stdout, stderr] of each run. All start at once."""
    start, hold = os.pipe()
    children, files = [], [[os.memfd_create(name) for name in ("out", "err")] for _ in runs]
    for words, (out, err) in zip(runs, files, strict=True):
        children.append(os.fork())
        if not children[-1]:
            os.close(hold)
            code = 99
            try:
                code = work(words, start, out, err)
            finally:
                os._exit(code)
    os.close(hold)
    answers = []
    for child, pair in zip(children, files, strict=True):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.append([code, *(os.pread(file, 1 << 20, 0).decode() for file in pair)])
        for file in pair:
            os.close(file)
    os.close(start)
    return answers


def made_up(supernet, subnet, *args):
    """An accuracy that depends on the subnet, after a while: two runs that start at once shall meet."""
    time.sleep(0.03)
    return sum(subnet.e) / 1000


def draw_nothing(history, path, **options):
    """Write a file in place of a picture."""
    with atomic_open(path, "wb") as file:
        file.write(b"picture")


def alone(name, *words):
    """Run a script in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        MAINS[name]([*words])
    return [[0, out.getvalue(), ""]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in LOADERS:
        module.load_splits = few
    config = methods.prepare.predictor.PredictorConfig
    methods.prepare.predictor.PredictorConfig = partial(config, epochs=2)
    elastic_nn.training.pairs.subnet_top1 = made_up
    methods.evolution.search.plot_history = draw_nothing
    for line in sys.stdin:
        runs = json.loads(line)
        print(json.dumps(side_by_side(runs) if len(runs) > 1 else alone(*runs[0])), flush=True)
