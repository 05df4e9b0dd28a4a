"""What a traced network may do beside its layers, and what is refused because nobody would count it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from apq.errors import UserError
from lut.operation_names import MOVES, POINTWISE, REDUCTIONS
from lut.traced import traced_layers

SIDE = 12


class Net(nn.Module):
    """A convolution, then a function of its output and the parts of the network."""

    def __init__(self, function, **parts):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.first(x))


def weights(*shape):
    return nn.Parameter(torch.ones(shape))


def conv():
    return nn.Conv2d(3, 4, 3)


def sequence(x):  # (1, 3, 12, 12) -> (1, 144, 3)
    return x.flatten(2).transpose(1, 2)


def dots(x, rows):
    return torch.stack([(x.flatten(1) * row).sum(1) for row in rows], 1)


def shifts(x):  # the nine parts that a 3x3 kernel sees
    padded = F.pad(x, (1, 1, 1, 1))
    return [padded[:, :, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)]


def in_place(x, weight):
    total = torch.zeros_like(x)
    for part in shifts(x):
        total.addcmul_(part, weight)
    return total


def gated(s, x):
    """Residual blocks that scale, gate and mix their features by hand, twenty times."""
    for _ in range(20):
        y = s.m(x)
        x = x + s.w * y
        x = x + y * s.m(x).mean((2, 3), True).sigmoid()
        gate = s.m(x).sigmoid()
        x = gate * x + (1 - gate) * y
    return x


def normed(s, x):
    """Norms and activations by hand between layers."""
    for _ in range(20):
        x = s.m(x)
        x = x * (x * x).mean(1, True).add(1e-6).rsqrt() * s.w
        x = (x - x.mean(1, True)) / (x - x.mean(1, True)).pow(2).mean(1, True).add(1e-6).sqrt() * s.w + s.w
        x = x * F.relu6(x + 3) / 6
        x = x * torch.sigmoid(x.mean((2, 3), True) + x.amax((2, 3), True))
        x = x * torch.sigmoid(x.mean(1, True))
    return x.mean((2, 3))


REFUSED = {  # name: (network, what the message must name)
    "lstm": (Net(lambda s, x: s.m(sequence(x))[0], m=nn.LSTM(3, 8, batch_first=True)), "layer m: it runs lstm"),
    "gru": (Net(lambda s, x: s.m(sequence(x))[0], m=nn.GRU(3, 8)), "layer m: it runs gru"),
    "rnn": (Net(lambda s, x: s.m(sequence(x))[0], m=nn.RNN(3, 8)), "layer m: it runs rnn_tanh"),
    "lstm-cell": (Net(lambda s, x: s.m(x[0, :, 0].T)[0], m=nn.LSTMCell(3, 8)), "layer m: it runs lstm_cell"),
    "gru-cell": (Net(lambda s, x: s.m(x[0, :, 0].T), m=nn.GRUCell(3, 8)), "layer m: it runs gru_cell"),
    "rnn-cell": (Net(lambda s, x: s.m(x[0, :, 0].T), m=nn.RNNCell(3, 8)), "layer m: it runs rnn_tanh_cell"),
    "attention": (Net(lambda s, x: F.scaled_dot_product_attention(*[sequence(x)] * 3)), "scaled_dot_product"),
    "multihead": (Net(lambda s, x: s.m(*[sequence(x)] * 3)[0], m=nn.MultiheadAttention(3, 1)), "layer m: .*multi_head"),
    "encoder": (
        Net(lambda s, x: s.m(sequence(x)), m=nn.TransformerEncoderLayer(3, 1, 8)),
        r"m\.self_attn: .*multi_head",
    ),
    "deformable": (
        Net(lambda s, x: s.m(x, torch.zeros(1, 18, 10, 10)), m=torchvision.ops.DeformConv2d(3, 4, 3)),
        "layer m: it runs deform_conv2d",
    ),
    "bilinear": (Net(lambda s, x: s.m(sequence(x), sequence(x)), m=nn.Bilinear(3, 3, 4)), "layer m: it runs bilinear"),
    "cdist": (Net(lambda s, x: torch.cdist(sequence(x), sequence(x))), "it runs cdist"),
    "cdist-l1": (Net(lambda s, x: torch.cdist(sequence(x), sequence(x), p=1)), "it runs cdist"),
    "pdist": (Net(lambda s, x: F.pdist(x[0, 0])), "it runs pdist"),
    "einsum": (Net(lambda s, x: torch.einsum("nchw,cd->ndhw", x, s.w), w=weights(3, 5)), "it runs einsum"),
    "tensordot": (Net(lambda s, x: torch.tensordot(x, s.w, dims=([1], [0])), w=weights(3, 5)), "it runs tensordot"),
    "matmul": (Net(lambda s, x: x @ x), "it runs matmul"),
    "vector": (Net(lambda s, x: x @ s.w, w=weights(12)), "it runs matmul"),
    "mv": (Net(lambda s, x: torch.mv(x[0, 0], s.w), w=weights(12)), "it runs mv"),
    "dot": (Net(lambda s, x: torch.dot(x.flatten(), x.flatten())), "it runs dot"),
    "inner": (Net(lambda s, x: torch.inner(x, s.w), w=weights(4, 12)), "it runs inner"),
    "addr": (Net(lambda s, x: torch.addr(x[0, 0], x[0, 0, 0], x[0, 0, 0])), "it runs addr"),
    "fourier": (Net(lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x) * s.w), w=weights(3, 12, 7)), "it runs fft_rfft2"),
    "complex": (
        Net(
            lambda s, x: F.conv2d(torch.complex(x, x), s.w), w=nn.Parameter(torch.ones(4, 3, 3, 3, dtype=torch.cfloat))
        ),
        "it runs complex",
    ),
    "inverse": (Net(lambda s, x: torch.linalg.inv(x[0, 0])), "it runs linalg_inv"),
    "vmap": (Net(lambda s, x: torch.vmap(lambda a: a @ a)(x[0])), "it runs matmul"),
    "conv1d": (Net(lambda s, x: s.m(x.flatten(2)), m=nn.Conv1d(3, 4, 3)), "layer m: it runs conv1d"),
    "bag": (Net(lambda s, x: s.m(x.flatten(1).long()), m=nn.EmbeddingBag(4, 5)), "layer m: it runs embedding_bag"),
    "aten": (Net(lambda s, x: torch.ops.aten.mm(x[0, 0], x[0, 0])), "it runs mm"),
    # products by hand
    "linear": (Net(lambda s, x: (x.flatten(1)[:, None] * s.w).sum(-1), w=weights(7, 432)), "parameter w with mul"),
    "one-output": (Net(lambda s, x: (x * s.w).sum((1, 2, 3)), w=weights(3, 12, 12)), "parameter w with mul"),
    "derived": (Net(lambda s, x: (x * (2 * s.w)).sum((1, 2, 3)), w=weights(3, 12, 12)), "parameter w with mul"),
    "prototypes": (
        Net(lambda s, x: (x.flatten(1)[:, None] - s.w).pow(2).sum(-1), w=weights(7, 432)),
        "by hand, with sum",
    ),
    "constants": (Net(lambda s, x: (x.flatten(1)[:, None] * torch.ones(7, 432)).sum(-1)), "by hand, with sum"),
    "features": (Net(lambda s, x: (x[..., None] * x[..., None, :]).sum(2)), "by hand, with sum"),
    "outer": (Net(lambda s, x: torch.outer(x.flatten(), x.flatten()).sum()), "by hand, with sum"),
    "involution": (
        Net(lambda s, x: (F.unfold(x, 3, padding=1).view(1, 3, 9, 144) * x.view(1, 3, 1, 144)).sum(2)),
        "by hand, with sum",
    ),
    "windows": (
        Net(lambda s, x: (x.unfold(2, 3, 1).unfold(3, 3, 1) * torch.ones(3, 3)).sum((-1, -2))),
        "by hand, with sum",
    ),
    # products by hand in loops
    "rows": (Net(lambda s, x: dots(x, s.w.sigmoid()), w=weights(7, 432)), "parameter w with mul"),
    "row-by-row": (
        Net(lambda s, x: torch.stack([(x.flatten(1) * s.w[i].sigmoid()).sum(1) for i in range(2)]), w=weights(7, 432)),
        "parameter w with mul",
    ),
    "buffer-rows": (
        Net(lambda s, x: dots(x, s.b), b=nn.Buffer(torch.ones(7, 432))),
        r"the network itself \(class Net\): it multiplies and adds up by hand, many times, with sum",
    ),
    "distances": (
        Net(lambda s, x: torch.stack([(x.flatten(1) - b).pow(2).sum(1) for b in s.b]), b=nn.Buffer(torch.ones(7, 432))),
        "by hand, many times, with sum",
    ),
    "attention-rows": (
        Net(lambda s, x: torch.stack([(sequence(x) * sequence(x)[:, i : i + 1]).sum(-1) for i in range(144)], 1)),
        "by hand, many times, with sum",
    ),
    "cost-volume": (
        Net(lambda s, x: torch.stack([(x * x.roll(d, 3)).mean(1) for d in range(8)], 1)),
        "by hand, many times, with mean",
    ),
    "stereo": (
        Net(lambda s, x: torch.stack([(x * s.m(x).roll(d, 3)).mean(1) for d in range(8)], 1), m=nn.Conv2d(3, 3, 1)),
        "by hand, many times, with mean",
    ),
    "depthwise": (
        Net(lambda s, x: sum(part * b for part, b in zip(shifts(x), s.b, strict=True)), b=nn.Buffer(torch.ones(9, 1))),
        "by hand, many times, with add",
    ),
    "depthwise-list": (
        Net(
            lambda s, x: sum(part * w for part, w in zip(shifts(x), s.w, strict=True)),
            w=nn.ParameterList([weights(3, 1, 1) for _ in range(9)]),
        ),
        "by hand, many times, with add",
    ),
    "depthwise-in-place": (Net(lambda s, x: in_place(x, s.w), w=weights(3, 1, 1)), "by hand, many times, with addcmul"),
    "involution-shifts": (
        Net(
            lambda s, x: sum(part * s.m(x)[:, i : i + 1] for i, part in enumerate(shifts(x))),
            m=nn.Conv2d(3, 9, 1),
        ),
        "by hand, many times, with add",
    ),
    "channels": (
        Net(
            lambda s, x: torch.stack([sum(x[:, c] * s.w[3 * o + c] for c in range(3)) for o in range(5)], 1),
            w=nn.ParameterList([weights(1) for _ in range(15)]),
        ),
        "by hand, many times, with add",
    ),
    "copies": (
        Net(lambda s, x: (torch.cat([x.flatten(1)] * 7) * s.b).sum(1), b=nn.Buffer(torch.ones(7, 432))),
        "by hand, many times, with sum",
    ),
    "copies-softmax": (
        Net(lambda s, x: (x.flatten(1).repeat(7, 1).softmax(0) * s.b).sum(1), b=nn.Buffer(torch.ones(7, 432))),
        "by hand, with sum",
    ),
    # layers whose weights are features
    "dynamic-linear": (Net(lambda s, x: F.linear(sequence(x), sequence(x)[0])), "weights are computed from the image"),
    "dynamic-conv": (
        Net(lambda s, x: F.conv2d(x, s.m(x.mean((2, 3))).view(4, 3, 3, 3)), m=nn.Linear(3, 108)),
        "weights are computed from the image",
    ),
    # a course that depends on the image
    "branch": (Net(lambda s, x: s.m(x) if x.mean() > 0 else x, m=conv()), "depends on the values"),
    "item": (Net(lambda s, x: s.m(x) * x.max().item(), m=conv()), "depends on the values"),
    "mask": (Net(lambda s, x: s.m(x[x > 0].view(1, -1)), m=nn.Linear(3, 4)), "depends on the values"),
    "nonzero": (Net(lambda s, x: x.nonzero()), "depends on the values"),
    # layers that Python does not see
    "parallel": (nn.DataParallel(nn.Conv2d(3, 4, 3)), "the network is wrapped in DataParallel"),
    "compiled": (torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3))), "the network is compiled"),
    "arguments": (Net(lambda s, x, y: x), "does not run on an image of 3 x 12 x 12: .*missing 1 required"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_would_count_is_refused_by_name(name):
    net, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        traced_layers(net, SIDE)
    if name not in ("constants", "windows", "deformable"):  # they hold tensors of the CPU
        with pytest.raises(UserError, match=message):
            traced_layers(net.to("meta"), SIDE)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_python_does_not_see_are_refused():
    with pytest.raises(UserError, match="the network is wrapped in RecursiveScriptModule"):
        traced_layers(torch.jit.script(nn.Sequential(conv())), SIDE)
    net = Net(lambda s, x: s.m(x), m=torch.jit.trace(conv(), torch.zeros(1, 3, 12, 12)))
    with pytest.raises(UserError, match="module m is wrapped in TopLevelTracedModule"):
        traced_layers(net, SIDE)
    net.m = conv()
    net.m.compile()
    with pytest.raises(UserError, match="module m is compiled"):
        traced_layers(net, SIDE)


def test_a_network_with_a_recurrent_head_is_not_priced_by_half():
    """Most multiply-accumulates of a CRNN are in its LSTM, which torch's counter does not see on CPUs."""

    class CRNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(1, 16, 3, padding=1), nn.LSTM(16 * 32, 64, batch_first=True)
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            x = self.conv(x).flatten(1, 2).transpose(1, 2)
            return self.head(self.lstm(x)[0])

    with pytest.raises(UserError, match="cannot list layer lstm: it runs lstm"):
        traced_layers(CRNN(), 32, in_channels=1)


FIRST = 9 * 144  # MACs of the first layer
ALLOWED = {  # name: (network, MACs of all its layers)
    "keyword": (Net(lambda s, x: s.m(input=x), m=conv()), FIRST + 4 * 3 * 9 * 100),
    "positions": (Net(lambda s, x: s.m(x + s.w), w=weights(3, 12, 12), m=conv()), FIRST + 10_800),
    "layer-scale": (Net(lambda s, x: s.m(x) * s.w, w=weights(3, 1, 1), m=nn.Conv2d(3, 3, 3)), FIRST + 3 * 3 * 9 * 100),
    "gates": (Net(gated, w=weights(3, 1, 1), m=nn.Conv2d(3, 3, 1, bias=False)), 61 * FIRST),
    "norms-by-hand": (Net(normed, w=weights(3, 1, 1), m=nn.Conv2d(3, 3, 1, bias=False)), 21 * FIRST),
    "row-scale": (Net(lambda s, x: x * s.w.abs().mean(1).view(3, 1, 1), w=weights(3, 5)), FIRST),
    "token": (Net(lambda s, x: torch.cat([s.w, sequence(x)], 1) + torch.ones(145, 3), w=weights(1, 1, 3)), FIRST),
    "spectral": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))), FIRST),
    "weight-norm": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))), FIRST),
    "folded": (Net(lambda s, x: F.conv2d(x, (s.u @ s.v)[..., None, None]), u=weights(4, 2), v=weights(2, 3)), 21 * 144),
    "unfold": (Net(lambda s, x: s.m(F.unfold(x, 4, stride=4).mT), m=nn.Linear(48, 5)), FIRST + 48 * 5 * 9),
    "bam": (Net(lambda s, x: (x * (x.mean((2, 3), True) * x.mean(1, True))).mean((2, 3))), FIRST),
    "grey": (Net(lambda s, x: s.m((x[:, :1].expand(-1, 3, -1, -1) - torch.ones(3, 1, 1)) / 2), m=conv()), 12_096),
    "embedding": (Net(lambda s, x: s.m(x.argmax(1)), m=nn.Embedding(3, 5)), FIRST),
    "constants": (Net(lambda s, x: s.m(x) if torch.arange(3, device=x.device).sum() == 3 else x, m=conv()), 12_096),
    "norms": (
        nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4),
            nn.LayerNorm([4, 12, 12]), nn.LocalResponseNorm(3), torchvision.ops.SqueezeExcitation(4, 2),
        ),
        3 * 4 * 144 + 4 * 2 + 2 * 4,
    ),
    "activations": (
        nn.Sequential(
            nn.Conv2d(3, 3, 1, bias=False), nn.PReLU(3), nn.Mish(True), nn.Hardswish(True), nn.GELU(), nn.SELU(),
            nn.CELU(), nn.ELU(True), nn.Softplus(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.RReLU(),
            nn.Hardsigmoid(True), nn.SiLU(True), nn.ReLU6(True), nn.Threshold(1, 2, True), nn.Softmin(1),
            nn.Softmax2d(), nn.Dropout2d(),
            nn.AlphaDropout(), nn.Hardshrink(), nn.Softshrink(), nn.LeakyReLU(0.1, True), nn.GLU(2), nn.Hardtanh(),
        ),
        FIRST,
    ),
    "maps": (
        nn.Sequential(
            nn.Conv2d(3, 3, 1, bias=False), nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.LPPool2d(2, 2, 1),
            nn.AdaptiveAvgPool2d(6), nn.AdaptiveMaxPool2d(4), nn.ZeroPad2d(1), nn.ReflectionPad2d(1),
            nn.CircularPad2d(1), nn.ReplicationPad2d(1), nn.Upsample(scale_factor=2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.PixelUnshuffle(4), nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.Flatten(), nn.Unflatten(1, (4, -1)),
        ),
        FIRST,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALLOWED)
def test_what_costs_nothing_may_run(name):
    net, macs = ALLOWED[name]
    layers = traced_layers(net, SIDE)
    assert sum(layer.macs for layer in layers) == macs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, SIDE, SIDE))
    constants = 2 * 4 * 3 if name == "folded" else 0  # a product that does not depend on the image
    assert counter.get_total_flops() == 2 * (macs + constants)


def test_listed_operations_do_not_multiply_and_add_up():
    """Torch's own counter of multiply-accumulates knows none of them, and no name is in two lists."""
    counted = {str(packet).removeprefix("aten.") for packet in flop_registry}
    assert {"mm", "bmm", "convolution"} <= counted
    assert not counted & (MOVES | POINTWISE | REDUCTIONS)
    products = re.compile(
        "mm$|mv$|conv|lstm|gru|rnn|attention|fft|cdist|pdist|dot|^linear|bilinear$|outer|cross|kron|solve"
    )
    assert not [name for name in MOVES | POINTWISE | REDUCTIONS if products.search(name)]
    assert not MOVES & REDUCTIONS
    assert not POINTWISE & (MOVES | REDUCTIONS)
    for name in counted & set(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        assert not any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def test_a_trace_writes_to_no_tensor_of_the_network():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(3))
            self.latest = torch.zeros(1, 3, SIDE, SIDE)

        def forward(self, x):
            self.calls += 1
            self.mean.lerp_(x.mean((0, 2, 3)), 0.5)
            self.latest[:] = x + 1
            return self.conv(self.latest - self.mean[:, None, None])

    net = Counting()
    for _ in range(2):
        assert [layer.macs for layer in traced_layers(net, SIDE)] == [9 * 144]
    assert net.calls == 0
    assert not net.mean.any()
    assert not net.latest.any()


def test_what_is_written_into_a_constant_depends_on_the_image():
    def by_hand(s, x):
        padded = torch.zeros(1, 3, 14, 14)
        padded[:, :, 1:-1, 1:-1] = x
        return torch.mm(padded[0, 0], torch.ones(14, 2))

    with pytest.raises(UserError, match="it runs mm"):
        traced_layers(Net(by_hand), SIDE)


def test_a_trace_leaves_nothing_in_the_network():
    """What a network keeps for its next run is of that run, not of a trace."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.grid, self.kept, self.seen = nn.Conv2d(3, 3, 1), None, {}, []
            self.register_buffer("ones", None)

        def forward(self, x):
            if self.grid is None:
                self.grid, self.ones = x.new_ones(1, 3, 1, 1), torch.ones_like(x)
                self.scale = nn.Parameter(x.new_ones(1))
                self.kept["zero"] = x.new_zeros(1)
                self.seen.append(x)
            return self.conv(x) * self.grid * self.ones + self.kept["zero"] + self.scale

    net = Keeping()
    for _ in range(2):
        assert [layer.macs for layer in traced_layers(net, SIDE)] == [9 * 144]
    assert (net.grid, net.ones, net.kept, net.seen) == (None, None, {}, [])
    assert set(net.state_dict()) == {"conv.weight", "conv.bias"}
    assert not hasattr(net, "scale")
    assert net(torch.zeros(1, 3, 8, 8)).device.type == "cpu"
    assert not net.grid.is_meta
