"""Folders with some of a network's classes: labels are its outputs. The command that makes such folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import elastic_nn.training.experiment_finetune as experiment_finetune
import methods.ddpg.search as ddpg
from apq.checkpoint import load_checkpoint
from apq.errors import UserError
from dataset import load_splits, names_of_outputs
from dataset.class_names import read_class_names
from dataset.imagenet import image_folder_model
from dataset.splits import make_loader
from dataset.subset import main as subset
from elastic_nn.networks.model_file import save_model
from elastic_nn.networks.named_models import build_model, named_model

search, quant_aware, report = (script(name) for name in ("search", "quant_aware", "test"))
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]  # the first five of ImageNet
CHOSEN = [WNIDS[1], WNIDS[3]]
NAME = "mobilenet_v2_small"


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A working folder with five classes of images in `full`, as many in each class as its number and three more."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(WNIDS):
            folder = tmp_path / "full" / part / name
            folder.mkdir(parents=True)
            for i in range(3 + number):
                Image.fromarray(rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "full"


def chosen_file(names=CHOSEN):
    Path("chosen.txt").write_text("\n".join(names) + "\n")
    return "chosen.txt"


def made(*flags):
    subset(["--data", "full", "--out", "some", *flags])
    return Path("some")


def network():
    """A network of five outputs that answers the fourth class to everything, and its spec."""
    spec = replace(named_model(NAME, "imagenet"), n_classes=len(WNIDS))
    torch.manual_seed(0)
    net = build_model(spec)
    last = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 9.0, 3.0]))
    return net, spec


def labels_of(part):
    return torch.cat([labels for _, labels in make_loader(part, 4)]).tolist()


def test_the_command_links_the_classes_of_a_file(full, capsys):
    some = made("--classes", chosen_file([*CHOSEN[::-1], ""]))
    assert capsys.readouterr().out == "some: links to 2 of the 5 classes of full\n"
    for part in ("train", "val"):
        assert sorted(path.name for path in (some / part).iterdir()) == CHOSEN
        for name in CHOSEN:
            assert (some / part / name).is_symlink()
            assert (some / part / name).resolve() == full / part / name
    assert (some / "classes.txt").read_text().split() == WNIDS
    assert sorted(path.name for path in Path().iterdir()) == ["chosen.txt", "full", "some"]
    with pytest.raises(UserError, match="some exists; choose another --out"):
        made("--n", "1")
    spec = image_folder_model(named_model(NAME, "imagenet"), some)  # a network of its own has two classes
    assert (spec.n_classes, set(labels_of(load_splits(spec, some).train))) == (2, {0, 1})


def test_drawn_classes_depend_on_the_seed_alone(full, capsys):
    found = []
    for place, seed in (("a", "0"), ("b", "0"), *((f"c{i}", str(i)) for i in range(1, 6))):
        subset(["--data", "full", "--out", place, "--n", "3", "--seed", seed, "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert printed["classes"] == sorted(path.name for path in Path(place, "train").iterdir())
        assert len(printed["classes"]) == 3
        found.append(tuple(printed["classes"]))
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_what_the_command_refuses(full, monkeypatch):
    for flags, match in (
        (["--n", "6"], "--n 6: full has 5 classes"),
        (["--classes", chosen_file([*CHOSEN, "n99999999"])], "lacks 1 of the classes in chosen.txt, such as n99999999"),
        (["--classes", "none.txt"], "none.txt"),
    ):
        with pytest.raises(UserError, match=match):
            made(*flags)
    for text, match in (("", "names no classes"), ("a\nb\na\n", "has the class a twice")):
        Path("wrong.txt").write_text(text)
        with pytest.raises(UserError, match=match):
            read_class_names(Path("wrong.txt"))

    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", full_disk)
        with pytest.raises(UserError, match=r"cannot write some: .*No space left"):
            made("--n", "2")
    (full / "val" / WNIDS[0]).rename(full / "val" / "other")
    with pytest.raises(UserError, match="train and val have other classes, such as"):
        made("--n", "2")
    assert sorted(path.name for path in Path().iterdir()) == ["chosen.txt", "full", "wrong.txt"]
    with pytest.raises(UserError, match="it must hold one folder of images a class"):
        subset(["--data", "nowhere", "--out", "some", "--n", "1"])


def test_labels_are_outputs_of_the_network(full, capfd):
    _, spec = network()
    some = made("--classes", chosen_file())
    splits = load_splits(spec, some, outputs=WNIDS)
    assert "some has 2 of the network's 5 classes: accuracy is that among all 5" in capfd.readouterr().err
    assert sorted(labels_of(splits.test)) == [1] * 4 + [3] * 6
    assert set(labels_of(splits.train) + labels_of(splits.val)) == {1, 3}
    shuffled = ["cat", WNIDS[3], "dog", WNIDS[1], "fox"]
    assert sorted(labels_of(load_splits(spec, some, outputs=shuffled).test)) == [1] * 6 + [3] * 4
    whole = load_splits(spec, full, outputs=WNIDS[::-1])
    assert sorted(labels_of(whole.test)) == [0] * 7 + [1] * 6 + [2] * 5 + [3] * 4 + [4] * 3
    plain, by_name = load_splits(spec, full), load_splits(spec, full, outputs=WNIDS)
    assert plain.source == by_name.source
    assert labels_of(plain.test) == labels_of(by_name.test)
    assert names_of_outputs(splits.source) == tuple(WNIDS)
    assert splits.source["classes"] == plain.source["classes"]
    assert splits.source["files"] != plain.source["files"]
    assert names_of_outputs({**splits.source, "names": WNIDS[::-1]}) == ()  # not those of the digest
    assert names_of_outputs({"dataset": "digits"}) == names_of_outputs(None) == ()


def test_folders_that_do_not_fit_the_network_are_refused(full):
    _, spec = network()
    some = made("--classes", chosen_file())
    for outputs, match in (
        ((), "2 training and 2 test classes; mobilenet_v2_small has 5, and it is not known which of them these are"),
        (WNIDS[:4], "4 names of classes are given; mobilenet_v2_small has 5"),
        ([*WNIDS[:3], "x", "y"], f"other classes than the network's 5, such as {WNIDS[3]}"),
    ):
        with pytest.raises(UserError, match=match):
            load_splits(spec, some, outputs=outputs)
    with pytest.raises(UserError, match="5 training and 5 test classes; mobilenet_v2_small has 2"):
        load_splits(replace(spec, n_classes=2), full, outputs=CHOSEN)


def test_haq_on_a_subset_of_the_classes(full, capfd, monkeypatch):
    """Bits for plain weights, --data with two of the five classes, and --classes; then a finetune and the test."""
    net, _ = network()
    torch.save(net.state_dict(), "w.pth")
    made("--classes", chosen_file())
    flags = ["--mode", "ddpg", "--model", NAME, "--weights", "w.pth", "--recipe", "tiny", "--data", "some"]
    Path("bits.json").write_text(json.dumps([[8, -1]] + [[8, 8]] * 22))
    flags += ["--policy", "bits.json", "--type", "size", "--exp_dir", "e"]
    with pytest.raises(UserError, match=r"not known which of them these are \(search.py --mode ddpg takes.*--classes"):
        search(flags)
    search([*flags, "--classes", "some/classes.txt"])
    images = load_checkpoint(Path("e/model.pt"))["images"]
    assert names_of_outputs(images) == tuple(WNIDS)
    # The network answers output 3 always: its accuracy is the share of that class among the images.
    monkeypatch.setattr(experiment_finetune, "finetune", lambda net, *_, **__: (0.5, net.state_dict()))
    quant_aware(["--exp_dir", "e"])
    capfd.readouterr()
    report(["--exp_dir", "e", "--json"])
    assert json.loads(capfd.readouterr().out)["top1"] == pytest.approx(6 / 10)
    report(["--exp_dir", "e", "--data", "full", "--json"])  # later steps know the classes: the whole folder fits too
    assert json.loads(capfd.readouterr().out)["top1"] == pytest.approx(6 / 25)


def test_weights_that_record_their_classes_need_no_file(full, monkeypatch):
    """Those of train.py --model on the whole folder. A file that contradicts them is refused."""
    net, spec = network()
    save_model(Path("models") / NAME / "model.pt", spec, net.state_dict(), load_splits(spec, full).source)
    made("--classes", chosen_file())
    flags = ["--mode", "ddpg", "--model", NAME, "--recipe", "tiny", "--data", "some", "--type", "size"]

    def labels(task, config, session, *rest):
        pytest.fail(str(session.splits.test.folder.outputs))

    monkeypatch.setattr(ddpg, "search_bits", labels)
    with pytest.raises(pytest.fail.Exception, match=r"\[1, 3\]"):
        search([*flags, "--exp_dir", "e"])
    Path("turned.txt").write_text("\n".join(WNIDS[::-1]))
    with pytest.raises(UserError, match="trained on images of other classes"):
        search([*flags, "--classes", "turned.txt", "--exp_dir", "f"])
