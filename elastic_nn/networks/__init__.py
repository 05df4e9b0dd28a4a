"""Networks built from a search space."""

from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.dynamic_quantized_proxyless import DynamicQuantizedProxylessNASNets
from elastic_nn.networks.mbconv_net import MBConvNet
from elastic_nn.networks.subnet import build_subnet, extract_subnet

__all__ = [
    "DynamicProxylessNASNets",
    "DynamicQuantizedProxylessNASNets",
    "MBConvNet",
    "build_subnet",
    "extract_subnet",
]
