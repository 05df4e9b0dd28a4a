"""A subnet as a network of its own: cut out of a supernet, or built to load a checkpoint into."""

from __future__ import annotations

import torch

from apq.skeleton import without_weights
from apq.space import SearchSpace
from apq.subnet import Subnet
from elastic_nn.modules.elastic_conv import ElasticConv2d
from elastic_nn.modules.mbconv import ConvNormAct
from elastic_nn.modules.squeeze_excite import ElasticSqueezeExcite
from elastic_nn.networks.mbconv_net import MBConvNet, subnet_blocks
from elastic_nn.quantizers import Quantizer, QuantScheme


def build_subnet(space: SearchSpace, subnet: Subnet, scheme: QuantScheme) -> MBConvNet:
    """The subnet with new weights, at its bits."""
    net = MBConvNet(space, subnet_blocks(space, subnet), scheme)
    for index, slot in enumerate(subnet.running_slots(space), start=1):
        net.set_block_bits(index, space, tuple(row[slot.index] for row in subnet.bits))
    net.set_shared_bits(space, subnet.shared_bits)
    return net


@torch.no_grad()
def extract_subnet(supernet: MBConvNet, space: SearchSpace, subnet: Subnet) -> MBConvNet:
    """Cut the active subnet out of a supernet, with copies of weights, BatchNorm statistics and ranges."""
    with without_weights():  # every tensor is copied below
        net = build_subnet(space, subnet, supernet.scheme)
    like = next(supernet.parameters())
    net = net.to(like.dtype).to_empty(device=like.device)
    pairs = [(supernet.first_conv, net.first_conv), (supernet.feature_mix_layer, net.feature_mix_layer)]
    for source, target in zip(supernet.active_blocks, net.blocks, strict=True):
        named = supernet.blocks[source].layers()
        pairs += [(named[role], unit) for role, unit in target.layers().items()]
        if isinstance(target.squeeze, ElasticSqueezeExcite):
            target.squeeze.copy_first(supernet.blocks[source].squeeze)
    for source, target in pairs:
        _copy_unit(source, target)
    net.dropout.p = supernet.dropout.p
    for name in ("pooled_mix_layer", "classifier"):
        net.get_submodule(name).load_state_dict(supernet.get_submodule(name).state_dict())
    return net.train(supernet.training)


def _copy_unit(source: ConvNormAct, target: ConvNormAct) -> None:
    _copy_conv(source.conv, target.conv)
    channels = target.norm.num_features
    target.norm.momentum, target.norm.eps = source.norm.momentum, source.norm.eps
    for key, tensor in target.norm.state_dict().items():
        saved = source.norm.state_dict()[key]
        tensor.copy_(saved[:channels] if saved.ndim else saved)


def _copy_conv(source: ElasticConv2d, target: ElasticConv2d) -> None:
    out, in_channels = target.weight.shape[:2]
    target.weight.copy_(source.active_weight(out if source.depthwise else in_channels))
    _copy_quantizer(source.weight_quant, target.weight_quant)
    _copy_quantizer(source.act_quant, target.act_quant)


def _copy_quantizer(source: Quantizer, target: Quantizer) -> None:
    target.load_state_dict(source.at_kernel().state_dict())
