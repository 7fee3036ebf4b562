"""How many groups of experts the tokens of the packaged model use, by how these are grouped.

    python benchmarks/group_pairs.py           about a minute on a CPU

Writes benchmarks/results/group_pairs.json: for each layer and size of a group the groups of a
token in the mean, on held-out text. `random`: groups drawn at random, the mean of 8 draws;
`chosen_together`: of experts that are chosen together on other text
(`moejax.compress.wide`); `independent`: were K experts chosen independently of each other; `least`:
as few as hold K. `away` = (chosen_together − least) / (independent − least).
"""

from __future__ import annotations

import argparse

import numpy as np
from common import write_results
from group_prediction import pairs_of_a_token
from layer_shapes import Shape

from moejax.compress.config import CompressConfig
from moejax.compress.layers import LayerRunner, StoredLayers
from moejax.compress.texts import read_texts
from moejax.compress.wide import chosen_together, equal_groups
from moejax.inference.source import open_model
from moejax.training.config import DataConfig


def groups_of_a_token(experts_TK: np.ndarray, groups_GM: np.ndarray) -> float:
    """Distinct groups of a token's experts, in the mean."""
    group_E = np.empty(groups_GM.size, np.int64)
    for group, members in enumerate(groups_GM):
        group_E[members] = group
    sorted_TK = np.sort(group_E[experts_TK], axis=1)
    return float(1 + (np.diff(sorted_TK, axis=1) > 0).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="packaged")
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=16384, help="to group by")
    parser.add_argument("--windows", type=int, default=48, help="of held-out text to count on")
    parser.add_argument("--name", default="group_pairs")
    args = parser.parse_args()
    source = open_model(None if args.model == "packaged" else args.model)
    config = CompressConfig(args.model, "", data=DataConfig(seq_len=256), tokens=args.tokens)
    texts = read_texts(config, source.need_tokenizer(), source.bos_id)
    stored = StoredLayers(source)
    full = texts.windows.tokens[texts.windows.mask.all(1)]
    chosen = np.linspace(0, len(full) - 1, min(args.windows, len(full))).round().astype(int)
    first, run = len(texts.calibration_WS), LayerRunner(stored.config)
    held_WS = full[chosen][:, : texts.calibration_WS.shape[1]]
    x_WSD = stored.read("params/embedding.w")[np.concatenate([texts.calibration_WS, held_WS])]
    rng, rows = np.random.default_rng(0), []
    for index, layer in enumerate(stored.config.layers()):
        passed = run(layer, stored.layer(index), x_WSD)
        x_WSD = passed.x_WSD
        if passed.sample is None or layer.moe is None:
            continue
        experts, top_k = layer.moe.router.num_experts, layer.moe.router.top_k
        shape, split = Shape(1, 1, 1, experts, top_k), first * x_WSD.shape[1]
        known = type(passed.sample)(*(a[:split] for a in vars(passed.sample).values()))
        other_TK = passed.sample.experts_TK[split:]
        affinity_EE = chosen_together(known, experts)
        for size in args.sizes:
            drawn = [rng.permutation(experts).reshape(-1, size) for _ in range(8)]
            row = {
                "layer": index,
                "size": size,
                "random": float(np.mean([groups_of_a_token(other_TK, g) for g in drawn])),
                "chosen_together": groups_of_a_token(other_TK, equal_groups(affinity_EE, size)),
                "independent": pairs_of_a_token(shape, size),
                "least": pairs_of_a_token(shape, size, 0.0),
            }
            gap = row["independent"] - row["least"]
            row["away"] = (row["chosen_together"] - row["least"]) / gap
            rows.append({k: round(v, 4) for k, v in row.items()})
            print(rows[-1], flush=True)
    write_results(args.name, rows, tokens=args.tokens, windows=len(held_WS))


if __name__ == "__main__":
    main()
