"""Measures sizes of tiles on this GPU, and stores those that beat the heuristic's.

    python -m pallas_kernels.tuning --shape 32768,2048,768,128,8
    python -m pallas_kernels.tuning --shape 1,2048,768,128,8 --tokens 16 256
    python -m pallas_kernels.tuning --product 32768,4096,4096,16 --output mine.json

--shape is a layer of experts: tokens T, model width D, expert width H, experts E, of a token K.
Of so few tokens that the forward treats tiles as nearly empty, only the forward is tuned.
--product is a grouped matmul: rows M, contraction K, columns N, groups G. An entry takes the place
of an earlier one for the same product. After Ctrl-C what was found so far is in the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.tuning.search import Work

__all__ = ["parse", "works_of"]

MOST = 2**31 - 1  # sizes and places are int32
PASSES = ("fwdbwd", "fwd")


def _is_positive(text: str) -> bool:
    return text.isdecimal() and len(text) <= 10 and 0 < int(text) <= MOST


def _positive(text: str) -> int:
    if not _is_positive(text):
        raise argparse.ArgumentTypeError(f"{text[:40]}: an integer from 1 to {MOST} is needed")
    return int(text)


def _numbers(count: int, names: str) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        words = text.split(",")
        if len(words) != count or not all(map(_is_positive, words)):
            raise argparse.ArgumentTypeError(
                f"{text[:80]!r}: {count} integers {names} from 1 to {MOST} are needed"
            )
        return tuple(map(int, words))

    return parse


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no JAX; ends the process if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(name: str, **options) -> None:
        parser.add_argument(name, nargs="+", action="extend", **options)

    several("--shape", type=_numbers(5, "T,D,H,E,K"), default=[], metavar="T,D,H,E,K")
    several("--product", type=_numbers(4, "M,K,N,G"), default=[], metavar="M,K,N,G")
    several("--tokens", type=_positive, help="in the place of the shapes' T")
    parser.add_argument("--activation", help="of the shapes' experts; default swiglu")
    parser.add_argument(
        "--alignment",
        type=int,
        choices=(1, 128),
        help="of the products' groups, default 128; with 1 they have any size",
    )
    several("--passes", choices=PASSES, help="default both")
    parser.add_argument("--most", type=_positive, default=10, help="cuts to try of each product")
    parser.add_argument("--rounds", type=_positive, default=5, help="each times every program once")
    parser.add_argument("--output", type=Path, help="table; in a checkout by default its own")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be tried")
    args = parser.parse_args(argv)
    if not args.shape and not args.product:
        parser.error("nothing to tune: give a --shape or a --product")
    for name, needed in (("tokens", "shape"), ("activation", "shape"), ("alignment", "product")):
        if getattr(args, name) is not None and not getattr(args, needed):
            parser.error(f"--{name} is of a --{needed}, and none is given; leave it out")
    args.activation = args.activation or "swiglu"
    args.alignment = args.alignment or 128
    args.passes = args.passes or list(PASSES)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError where the operations do not serve what is asked."""
    from jax.numpy import bfloat16

    from pallas_kernels.fused_experts import api as fused

    for shape in args.shape:
        tokens, d_model, hidden, experts, top_k = shape
        case = fused.Case(d_model, hidden, args.activation, bfloat16)
        reason = fused.refusal("mosaic_gpu", case, forced=True)
        places = max(args.tokens or [tokens]) * top_k + experts * fused.ROW_ALIGNMENT
        if top_k > experts:
            reason = f"{top_k} experts a token, and there are {experts}"
        elif places > MOST:
            reason = f"up to {places} places are more than {MOST}; give fewer tokens"
        if reason is not None:
            raise ValueError(f"--shape {','.join(map(str, shape))}: {reason}")
    for sizes in args.product:
        if sizes[0] % args.alignment:
            raise ValueError(
                f"--product {','.join(map(str, sizes))}: M must be a multiple of --alignment "
                f"{args.alignment}; or give --alignment 1"
            )


def works_of(args: argparse.Namespace) -> tuple[list[Work], list[str]]:
    """What is to be tuned, and one line on each pass that is not.

    Raises:
        ValueError: the operations do not serve it, or nothing is left.
    """
    from pallas_kernels.fused_experts import api as fused
    from pallas_kernels.tuning.works import Layer, Products

    _check(args)
    works: dict[Work, None] = {}
    skipped: dict[str, None] = {}
    for which in dict.fromkeys(args.passes):
        backward = which == "fwdbwd"
        for tokens, d_model, hidden, experts, top_k in args.shape:
            for count in args.tokens or [tokens]:
                sizes = (d_model, hidden, experts, top_k, backward, args.activation)
                layer = Layer(count, *sizes)
                if backward and count * top_k <= fused.FEW_ROWS * experts:
                    skipped[f"skipped: {layer.name}: so few tokens are a step of decoding"] = None
                else:
                    works[layer] = None
        for rows, contraction, columns, groups in args.product:
            product = Products(rows, contraction, columns, groups, backward, args.alignment)
            works[product] = None
    if not works:
        raise ValueError(f"nothing to tune: {next(iter(skipped))}; give --passes fwd")
    return list(works), list(skipped)
