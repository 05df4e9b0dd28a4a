"""Which of torch's operations a network may run beside its layers: those that do not multiply and add up.

A network runs on a meta tensor, so that the answer depends neither on a device nor on the values of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lut.operation_names import ADDITIVE, MOVES, POINTWISE, READS_VALUES, REDUCTIONS, SUMS, SUMS_OF_PRODUCTS

SUMMED_PER_VALUE = 4  # products by hand that may be added up per value of a feature: norms and gates need three


@dataclass(eq=False)
class _Root:
    """A feature from which others are computed: the image, or what a layer or reduction returned.

    `summed` is the number of its products, by hand, that were added up so far.
    """

    size: int
    summed: int = 0


@dataclass(eq=False)
class _Product:
    """`size` values of `root` multiplied by hand. `summed` says that they were added up, and counted."""

    root: _Root
    size: int
    summed: bool = False


@dataclass(frozen=True)
class _Origin:
    """Where the values of a tensor come from.

    `values` is the number of values of the image's features from which they are computed. `product` says that there are
    more of them than that, because two tensors were broadcast against each other: a sum of such values is a matrix
    product by hand. `matrix` names the parameter of two or more dimensions from which a constant is computed. `root` is
    the feature that the tensor is computed from, and `products` are the products by hand that it holds.
    """

    of_image: bool = False
    values: int = 0
    product: bool = False
    matrix: str | None = None
    root: _Root | None = None
    products: tuple[_Product, ...] = ()


class OperationWatch(TorchDispatchMode):
    """Context in which a network runs without computing: what depends on the image becomes a meta tensor.

    Outside listed layers (`in_layer`) it refuses operations that may multiply and add up, products with parameters of
    two or more dimensions, and loops that add up more than SUMMED_PER_VALUE products per value of a feature. `refusal`
    makes the error from a reason; `running` is the torch function that runs.
    Constants are computed where they are. Tensors from before are not written to.
    """

    def __init__(self, net: nn.Module, image: Tensor, refusal: Callable[[str], Exception]) -> None:
        super().__init__()
        self.in_layer, self.running = False, ""
        self.refusal = refusal
        self._home = next((p.device for p in net.parameters() if not p.is_meta), torch.device("cpu"))
        self._matrices = {_key(p): name for name, p in net.named_parameters() if _is_matrix(p)}
        self._origins = {_key(image): self._new(image.numel())}  # of what is made in this context
        self._joined: dict[frozenset[int], _Root] = {}  # by the ids of the features that were joined
        self._roots: list[_Root] = []  # keeps those ids
        self._alive = [image]  # a key is an address, which is reused once its tensor is freed

    def of_image(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor depend on the image."""
        return self._origin(tensor).of_image

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function: with meta tensors only if one of its arguments depends on the image."""
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and self.of_image(leaf) for leaf in leaves):
            return self._run_on_meta(function, args, kwargs)
        return function(*args, **self._at_home(kwargs))

    def _run_on_meta(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with meta tensors in place of tensors. Where it returns one of those, return the tensor."""
        given: list[tuple[Tensor, Tensor]] = []

        def meta(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("meta")
            if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
                return value
            twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._set(twin, self._origin(value))
            given.append((twin, value))
            return twin

        with torch._C._DisableTorchDispatch():  # its own tensors are not the network's
            args, kwargs = tree_map(meta, (args, kwargs))
        result = function(*args, **kwargs)
        for twin, value in given:
            if self._origin(twin).of_image:  # it was written to
                self._set(value, self._origin(twin))
        back = {id(twin): value for twin, value in given}
        return tree_map(lambda value: back.get(id(value), value), result)

    def _at_home(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for a constant. One made for the image's device is made where the network is, with values."""
        on_meta = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta"
        return {**kwargs, "device": self._home} if on_meta else kwargs

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origins = [self._origin(tensor) for tensor in tensors]
        written = _written(op, args, kwargs)
        from_before = any(_key(tensor) not in self._origins for tensor in written)
        of_image = from_before or any(origin.of_image for origin in origins)
        if of_image and not self.in_layer:
            self._check(op, tensors, origins)
            self._count(op, tensors, origins)
        on_meta = of_image or any(tensor.is_meta for tensor in tensors)
        result = self._run_on_meta(op, args, kwargs) if on_meta else op(*args, **self._at_home(kwargs))
        views = {_key(tensor) for tensor in tensors} - {_key(tensor) for tensor in written}
        for output in tree_leaves((result, written)):
            if isinstance(output, Tensor) and _key(output) not in views:  # a view has the origin of its storage
                self._set(output, self._origin_of_output(op, output, tensors, origins, of_image))
        return result

    def _check(self, op: OpOverload, tensors: list[Tensor], origins: list[_Origin]) -> None:
        """Raise the refusal of an operation on features of the image that costs more than it shows."""
        name, shown = _name(op), self.running or str(op.overloadpacket).removeprefix("aten.")
        by_mask = any(tensor.dtype == torch.bool for tensor in tensors)
        if name in READS_VALUES or (name.startswith("index") and by_mask):
            raise self.refusal(f"what it runs depends on the values of the image ({shown})")
        if name in REDUCTIONS:
            if any(origin.product for origin in origins):
                raise self.refusal(
                    f"it multiplies and adds up by hand, with {shown}; use a convolution or linear layer"
                )
        elif _is_pointwise(op):
            if matrix := next((o.matrix for o in origins if o.matrix is not None and name not in ADDITIVE), None):
                raise self.refusal(
                    f"it multiplies parameter {matrix} with {shown}, not in a convolution or linear layer"
                )
        elif name not in MOVES and not op.is_view:
            raise self.refusal(f"it runs {shown}; only 2-D convolutions and linear layers have costs")

    def _count(self, op: OpOverload, tensors: list[Tensor], origins: list[_Origin]) -> None:
        """Count the products by hand that an operation adds up. Raise the refusal of too many of one feature."""
        name, products = _name(op), []
        holders = [origin.products for origin in origins if origin.products]
        if name in REDUCTIONS or (name in SUMS and len(holders) > 1):
            products = [product for held in holders for product in held if not product.summed]
        elif name in SUMS_OF_PRODUCTS:
            products = [_product_of(tensors, origins, max(tensor.numel() for tensor in tensors))]
        for product in products:
            if not product.summed:
                product.summed = True
                product.root.summed += product.size
            if product.root.summed > SUMMED_PER_VALUE * product.root.size:
                shown = self.running or str(op.overloadpacket).removeprefix("aten.")
                raise self.refusal(
                    f"it multiplies and adds up by hand, many times, with {shown}; use a convolution or linear layer"
                )

    def _new(self, size: int) -> _Origin:
        """Origin of a feature that no product by hand has used."""
        return _Origin(of_image=True, values=size, root=_Root(size))

    def _join(self, origins: list[_Origin], size: int) -> _Root:
        """The feature from which some tensors are computed. Of the same features it is always the same one."""
        roots = {id(origin.root): origin.root for origin in origins if origin.root is not None}
        if len(roots) == 1:
            return next(iter(roots.values()))
        if not roots:
            return _Root(size)
        self._roots += roots.values()
        return self._joined.setdefault(frozenset(roots), _Root(size))

    def _origin_of_output(
        self, op: OpOverload, output: Tensor, tensors: list[Tensor], origins: list[_Origin], of_image: bool
    ) -> _Origin:
        if not of_image:
            matrix = next((origin.matrix for origin in origins if origin.matrix is not None), None)
            kept = _is_matrix(output) or _name(op) not in REDUCTIONS  # such as a row, but not a norm of each row
            return _Origin(matrix=matrix if kept else None)
        if self.in_layer:
            return self._new(output.numel())
        if _name(op) in REDUCTIONS:
            given = [(o.values, t.numel()) for o, t in zip(origins, tensors, strict=True) if o.of_image]
            smaller = output.numel() <= sum(numel for _, numel in given)  # such as a softmax, not a larger map
            return self._new(min(output.numel(), sum(v for v, _ in given)) if smaller else output.numel())
        if _is_pointwise(op):
            counts = [min(o.values, t.numel()) for o, t in zip(origins, tensors, strict=True) if o.of_image]
            values = max(counts, default=output.numel())
            broadcast = sum(tensor.numel() > 1 for tensor in tensors) > 1 and output.is_floating_point()
        else:
            counts = [
                min(o.values, t.numel()) if o.of_image else t.numel() for o, t in zip(origins, tensors, strict=True)
            ]
            values, broadcast = sum(counts), False
        product = output.numel() > values and (broadcast or any(origin.product for origin in origins))
        before = self._origins.get(_key(output), _Origin())  # where a part of a tensor is written
        written = [before] if before.of_image else []
        return _Origin(
            of_image=True,
            values=max(values, before.values),
            product=product or before.product,
            root=self._join([*origins, *written], output.numel()),
            products=_products(op, output, tensors, origins) or before.products,
        )

    def _origin(self, tensor: Tensor) -> _Origin:
        key = _key(tensor)
        hidden = (
            "of a module that is not registered" if isinstance(tensor, nn.Parameter) and _is_matrix(tensor) else None
        )
        return self._origins.get(key) or _Origin(matrix=self._matrices.get(key, hidden))

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[_key(tensor)] = origin
        self._alive.append(tensor)


def _product_of(tensors: list[Tensor], origins: list[_Origin], size: int) -> _Product:
    """A product by hand. It is one of the largest feature among its factors, not of the gate that scales it."""
    features = [(min(t.numel(), o.root.size), o.root) for t, o in zip(tensors, origins, strict=True) if o.root]
    largest = max(features, key=lambda feature: (feature[0], -feature[1].size), default=(size, _Root(size)))
    return _Product(largest[1], size)


def _products(op: OpOverload, output: Tensor, tensors: list[Tensor], origins: list[_Origin]) -> tuple[_Product, ...]:
    """The products by hand that the output of an operation holds."""
    name = _name(op)
    multiplies = torch.Tag.pointwise in op.tags and name not in ADDITIVE | POINTWISE
    if multiplies and output.is_floating_point() and (len(tensors) > 1 or name in ("pow", "square")):
        product = _product_of(tensors, origins, output.numel())
        product.summed = name in SUMS_OF_PRODUCTS  # by `_count`
        return (product,)
    held = {id(product): product for origin in origins for product in origin.products}
    waiting = tuple(product for product in held.values() if not product.summed)
    return waiting or tuple(held.values())[:1]


def _key(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata  # views share it
    except NotImplementedError:  # sparse and batched tensors have none
        return id(tensor)


def _name(op: OpOverload) -> str:
    """Name of an aten operation, without the "_" of one that writes in place; other libraries keep their name."""
    namespace, _, name = op._schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else op._schema.name


def _is_pointwise(op: OpOverload) -> bool:
    return torch.Tag.pointwise in op.tags or _name(op) in POINTWISE


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) >= 2


def _written(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    if not op._schema.is_mutable:
        return []
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in changed for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]
