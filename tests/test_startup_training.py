"""The training scripts parse before they import what is heavy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT

from elastic_nn.quantizers import FLOAT, LSQ, MIXED

HEAVY = ("torch", "torchvision", "sklearn", "scipy", "matplotlib")
LOOK = (
    f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r})\n"
    "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    f"finally: print('imported:', [name for name in {HEAVY} if name in sys.modules])\n"
)


@pytest.mark.parametrize("script", ["train.py", "quant_aware.py"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--epochz=3", 2)])
def test_help_and_a_mistyped_flag_import_nothing_heavy(tmp_path, script, flag, code):
    command = [sys.executable, "-c", LOOK, str(ROOT / script), flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_quantizers_of_the_parser_are_those_that_supernets_are_trained_with():
    spec = importlib.util.spec_from_file_location("script_train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (FLOAT.name, LSQ.name, *MIXED) == module.QUANTIZERS
