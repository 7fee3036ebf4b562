"""One MoE layer over several devices, router included, in bf16: how fast, and what of it is hidden.

    python benchmarks/ep_layer.py --shapes qwen3_30b_a3b --passes fwd --minutes 8
    python benchmarks/ep_layer.py --modes ring --options no_async --add --profile /tmp/profile
    JAX_PLATFORMS=cpu python benchmarks/ep_layer.py --tiny    # a rehearsal on fake devices

Writes benchmarks/results/ep_layer_h200x4.json: predictions first (`ms` null), then every round.

- The layer is `MoELayer` inside a shard_map over all devices along `expert`, as training uses it;
  tokens, cotangents and weights are normally distributed. `balanced` routing is uniformly random:
  a random router and no bias. `zipf` adds fixed biases to the logits, so that the experts' shares
  fall as 1/rank (`layer_shapes.zipf_bias`); ranks are dealt to the experts at random.
- `xla_all_to_all` is what one writes in JAX without the library (`ep_programs`): sort, buckets of K
  copies a token, batched products. It has no router, and its routing is even, not random.
- `fwd` is y. `fwdbwd` is Σ y·ct and its gradients; the router's is not summed over devices.
- `ms` is the median of groups of back-to-back calls, `ms_spread` (largest − smallest) / median. A
  round has a group of every program of a shape and pass. `tflops_per_gpu` counts 6·T·D·H·K forward
  and three times that with backward, T tokens of one device.
- `ms_no_comm`, `ms_no_compute` and `ms_neither` are the same program without exchange, without
  experts, without both (`ep_alone` says how); `hidden_fraction` is (computation + exchange −
  total) / exchange, where computation is `ms_no_comm` and exchange `ms_no_compute` − `ms_neither`.
- `bytes_sent` is what a device sends in a pass, counted in the traced program, all `waves`: as many
  as the chunk that needed most. It is the same for every device, since buckets are of one size.
- `predicted_ms`: `ep_shapes.predicted_ms` of the FLOPs at the one-device rate, times the load of
  the busiest device over the mean, and of the bytes at the rate of a link.
- `scheduled` counts the compiled program's collectives of rows, and those that have kernels of
  the experts between start and end.
- A variant is checked first: a small layer against float32 (`errors`), then at full size against
  the first exact variant (`difference`). What fails has `error` in the place of figures.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import expert_mesh, write_results
from ep_options import OPTIONS
from ep_shapes import IMPLS, MODES, PASSES, ROUTINGS, SHAPES, WIRES, link_gbs, one_device_tflops

KEY = (
    "impl",
    "shape",
    "routing",
    "wire",
    "pass",
    "mode",
    "chunks",
    "options",
    "slack",
    "reserve_sms",
)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, choices, default in (
        ("shapes", SHAPES, list(SHAPES)),
        ("passes", PASSES, list(PASSES)),
        ("routings", ROUTINGS, list(ROUTINGS)),
        ("impls", IMPLS, list(IMPLS)),
        ("modes", MODES, ["auto"]),
        ("wires", WIRES, ["exact"]),
        ("options", OPTIONS, ["default", "overlap_costs"]),
    ):
        parser.add_argument(f"--{flag}", nargs="+", choices=list(choices), default=default)
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--slacks", nargs="+", type=float, default=[1.5], help="of buckets")
    parser.add_argument("--reserve-sms", nargs="+", type=int, default=[0], help="for transfers")
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--no-parts", action="store_true", help="total times only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.0, help="ends cleanly after these")
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--tflops", type=float, help="one device's, for the prediction")
    parser.add_argument("--link-gbs", type=float, help="a link's, for the prediction")
    parser.add_argument("--profile", help="a folder: profiles each variant, balanced routing")
    parser.add_argument("--name", help="result file; default ep_layer_h200x4, nothing for --tiny")
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to rehearse anywhere")
    args = parser.parse_args(words)
    if args.name is None and not args.tiny:
        args.name = "ep_layer_h200x4"
    args.deadline = time.monotonic() + 60 * args.minutes
    return args


class Book:
    """All rows, written whenever some change."""

    def __init__(self, args: argparse.Namespace, devices: int) -> None:
        import jax
        from expert_layer import earlier_rows

        self.name, self.more = args.name, {"devices": devices}
        self.rows: dict[tuple, dict[str, Any]] = {}
        self.kept = earlier_rows(args.name, jax.__version__) if args.add and args.name else []

    def put(self, rows: list[dict[str, Any]]) -> None:
        """Adds or replaces rows; one that was kept makes way for a measured one only."""
        self.rows |= {_key(row): row for row in rows}
        if self.name is not None:
            done = {key for key, row in self.rows.items() if row["ms"] is not None}
            kept = [row for row in self.kept if _key(row) not in done]
            before = set(map(_key, kept))
            new = [row for key, row in self.rows.items() if key not in before]
            write_results(self.name, [*kept, *new], **self.more)


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[k] for k in KEY)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    head = "{impl:14} {shape:13} {pass:6} {routing:8} {mode:10} {chunks} {wire:6} {slack:3} "
    text = (head + "{reserve_sms:2} {options:14}").format(**row)
    if row.get("error"):
        print(f"{text} {row['error']}", flush=True)
        return
    hidden = "" if row["hidden_fraction"] is None else f", hidden {row['hidden_fraction']:.0%}"
    text += " {ms:8.3f} ms ±{ms_spread:5.1%} predicted {predicted_ms:7.3f}".format(**row)
    print(f"{text} {row['tflops_per_gpu']:6.1f} TFLOP/s{hidden}", flush=True)


def measure(args: argparse.Namespace, mesh: Any) -> list[dict[str, Any]]:
    """All that the flags ask for, as far as the time goes; returns the rows."""
    import jax
    from ep_batch import Batch, Checks

    book, checks = Book(args, mesh.size), Checks(mesh)
    timelines: list[dict[str, Any]] = []
    for shape in args.shapes:
        for which in args.passes:
            if time.monotonic() > args.deadline:
                print(f"the {args.minutes:g} minutes are over before {shape} {which}", flush=True)
                continue
            rates = (args.tflops or one_device_tflops(shape, which), args.link_gbs or link_gbs())
            batch = Batch(shape, which, mesh, args, rates)
            batch.run(book.put, checks)
            for row in batch.rows():
                show(row)
            timelines += batch.timelines
            if timelines and args.name is not None:
                write_results(f"{args.name}_timeline", timelines, devices=mesh.size)
            del batch
            jax.clear_caches()
    return list(book.rows.values())


def main() -> None:
    args = parse()
    measure(args, expert_mesh(args.devices, args.tiny))


if __name__ == "__main__":
    main()
