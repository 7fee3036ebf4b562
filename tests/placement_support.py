"""Counts of chosen experts by loops."""

import numpy as np


def brute_force(experts_NLK, num_experts):
    """Counts by loops: pairs [L, E, E], load [L, E], tokens [L]."""
    layers = experts_NLK.shape[1]
    pairs = np.zeros((layers, num_experts, num_experts))
    load, tokens = np.zeros((layers, num_experts)), np.zeros(layers)
    for token_LK in experts_NLK:
        for layer, row in enumerate(token_LK):
            chosen = [e for e in row if e >= 0]
            tokens[layer] += bool(chosen)
            for e in chosen:
                load[layer, e] += 1
                for f in chosen:
                    pairs[layer, e, f] += e != f
    return pairs, load, tokens


def assert_counts(found, wanted):
    for name, array in zip(("pairs_LEE", "load_LE", "tokens_L"), wanted):
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)
