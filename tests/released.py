"""What the tests of released MobileNetV3 supernets share: golden evaluations of the published code."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from apq.subnet import subnet_from_spec

LOGITS, SUMS = 1e-8, 1e-9  # tolerances: of the logits' standard deviation, of a block's sum of magnitudes
OUTPUTS = {  # golden names of outputs outside blocks, and whose output they are in our networks
    "first_conv": "first_conv",
    "final_expand_layer": "feature_mix_layer",
    "feature_mix_layer": "pooled_act",
    "classifier": "classifier",
}


def check_keys(written, rows, data):
    """The written state has the golden keys and shapes, in their order."""
    assert [[key, list(value.shape)] for key, value in written.items()] == rows
    assert (len(written), zlib.crc32("\n".join(written).encode())) == (data["n_keys"], data["keys_crc32"])


def check_fills(weights, checks):
    for check in checks:
        value = weights[check["key"]].double().flatten()
        assert list(weights[check["key"]].shape) == check["shape"]
        np.testing.assert_allclose(value[:3], check["first3"], rtol=1e-7)
        assert value.sum().item() == pytest.approx(check["sum_float64"], abs=1e-9)


def images(resolution):
    drawn = np.random.default_rng(7).standard_normal((2, 3, resolution, resolution))
    return torch.from_numpy(drawn.astype(np.float32).astype(np.float64))


def subnet_of(space, golden, **policy):
    """The golden architecture, at a resolution of the space: the weights do not depend on it."""
    spec = {name: golden[name] for name in ("ks", "e", "d")}
    return subnet_from_spec(space, {**spec, "resolution": space.resolutions[0], **policy})


@torch.no_grad()
def check_evaluation(net, golden):
    """Run the network once: each block's sum, the first that deviates first, and the logits. Returns them."""
    units = {ours: net.get_submodule(ours) for ours in OUTPUTS.values()}
    units |= {f"blocks.{i}": net.blocks[i] for i in net.active_blocks}
    found = {}

    def keep(name):
        return lambda unit, args, out: found.__setitem__(name, (out.sum().item(), out.abs().sum().item(), out.shape))

    hooks = [unit.register_forward_hook(keep(name)) for name, unit in units.items()]
    logits = net(images(golden["subnet"]["resolution"]))
    for hook in hooks:
        hook.remove()
    rows = golden["block_outputs_float64"]
    assert {OUTPUTS.get(name, name) for name, *_ in rows} == set(found)
    for name, total, magnitude, shape in rows:
        ours = found[OUTPUTS.get(name, name)]
        assert [n for n in ours[2] if n > 1] == [n for n in shape if n > 1], name
        assert ours[:2] == pytest.approx([total, magnitude], abs=SUMS * magnitude, rel=0), name
    check_logits(logits, golden["float64"])
    return logits


def check_logits(logits, expected):
    std = torch.tensor(expected["std"], dtype=torch.float64)
    np.testing.assert_allclose(logits.std(1, unbiased=False), std, rtol=LOGITS)
    deviations = (logits[:, :20] - torch.tensor(expected["first20"], dtype=torch.float64)).abs().amax(1) / std
    assert deviations.max().item() < LOGITS
    sums = (logits.sum(1) - torch.tensor(expected["sum"], dtype=torch.float64)).abs() / std
    assert sums.max().item() < LOGITS * logits.size(1)
    assert logits.argmax(1).tolist() == expected["argmax"]
