"""Show a space: its exact number of networks, what is chosen, and the MACs and BitOps of its ends.

python -m apq qfa-mbv3
"""

from __future__ import annotations

import json

from apq.cli import Parser, listing, run, table
from apq.genes import cardinalities, largest_subnet, smallest_subnet
from apq.layers import layers_of
from apq.presets import SPACES, get_space
from apq.space import FULL_PRECISION, SearchSpace


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m apq")
    parser.add_argument("space", help=f"a preset ({', '.join(SPACES)}) or the path of a space in a .json file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    space = get_space(args.space)
    facts = facts_of(space)
    if args.json:
        print(json.dumps(facts))
        return
    print(f"{space.name}: {facts['networks']:,} networks (about {facts['networks']:.2e})")
    ends = facts.pop("ends")
    print(listing({name.replace("_", " "): in_words(value) for name, value in facts.items() if name != "networks"}))
    print(table([("", *ends), *((name, *(f"{end[name]:g}" for end in ends.values())) for name in ends["largest"])]))


def facts_of(space: SearchSpace) -> dict[str, object]:
    """Facts about a space, as plain data."""
    ends = {}
    for name, subnet in (("smallest", smallest_subnet(space)), ("largest", largest_subnet(space))):
        layers = layers_of(space, subnet)
        macs, bitops = sum(layer.macs for layer in layers), sum(layer.bitops for layer in layers)
        ends[name] = {"MACs, M": macs / 1e6, "BitOps, M": bitops / 1e6}
    return {
        "networks": space.size(),
        "images": space.dataset,
        "resolutions": space.resolutions,
        "kernels": space.kernel_sizes,
        "expansion": space.ratios,
        "channel_step": space.channel_step,
        "widths": [stage.width for stage in space.stages],
        "depths": [stage.depths for stage in space.stages],
        "bits": {kind.name: kind.choices for kind in space.operands},
        "bits_of_layers": {f"{shared.layer} {shared.operand}": shared.choices for shared in space.shared_operands},
        "bits_of_first_convolution": _bits(space.end_bits),
        "bits_of_classifier": _bits(space.bits_of_classifier),
        "squeeze_and_excitation": "full precision" if any(stage.squeeze for stage in space.stages) else "none",
        "genes": len(cardinalities(space)),
        "ends": ends,
    }


def _bits(bits: int) -> int | str:
    return "full precision" if bits == FULL_PRECISION else bits


def in_words(value: object) -> str:
    """Format one fact as text. A long list becomes its first and last item."""
    if isinstance(value, dict):
        by_value: dict[str, list[str]] = {}
        for name, choices in value.items():
            by_value.setdefault(in_words(choices), []).append(name)
        return "; ".join(f"{choices} for {', '.join(names)}" for choices, names in by_value.items()) or "none"
    if isinstance(value, (tuple, list)):
        numbers = [in_words(item) for item in value]
        joined = (", " if any(" " in number for number in numbers) else " ").join(numbers)
        return f"{numbers[0]} to {numbers[-1]}, {len(numbers)} of them" if len(numbers) > 6 else joined
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main, "python -m apq", alone=True)
