"""Products of 8-bit floats on a Hopper GPU, and what their rounding does to an expert's result.

Tensor cores add such products with 14 bits: 32 products and the sum so far are aligned to the
largest of them, bits beyond 13 after the first are cut off (arXiv 2412.19437 §3.5.2). Hidden values
that lie near the middle between two e4m3 numbers are then rounded to the other one, and each of
these is off by a whole step: an error that float32 sums do not make and that few values carry.
"""

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.quantized_experts.format import BLOCK, quantize_rows

DEPTH = 32  # products that are added at once
FRACTION = 13  # bits after the first that are kept
E4M3 = ml_dtypes.float8_e4m3fn


def cut_product(x, x_scales, w, w_scales):
    """x @ w.T as the tensor cores make it, blocks of 128 then in full precision.

    x [R, K] and w [N, K] are values of 8 bits in float64; scales [R, K / 128], [N / 128, K / 128].
    Returns [R, N], and the standard deviation of what was cut off, [R, N].
    """
    out, variance = np.zeros((2, len(x), len(w)))
    for block in range(-(-x.shape[1] // BLOCK)):
        scale = x_scales[:, block, None] * np.repeat(w_scales[:, block], BLOCK)[: len(w)]
        total, cut = np.zeros((2, *out.shape))
        for start in range(block * BLOCK, (block + 1) * BLOCK, DEPTH):
            at = slice(start, start + DEPTH)
            terms = np.concatenate([x[:, None, at] * w[:, at], total[..., None]], axis=-1)
            largest = np.abs(terms).max(-1, keepdims=True)
            exponent = np.floor(np.log2(np.where(largest > 0, largest, 1.0)))
            unit = 2.0 ** (exponent - FRACTION)
            total = (np.trunc(terms / unit) * unit).sum(-1)
            # Of a term that lies below the unit, all is cut off; of others, anything up to it.
            cut += (np.minimum(np.abs(terms), unit / np.sqrt(3)) ** 2).sum(-1)
        out += total * scale
        variance += cut * scale**2
    return out, np.sqrt(variance)


def cut_hidden(rows, w_in, slot):
    """The hidden values of one expert [R, N, H] before the activation, likewise.

    rows [R, D] are rounded to e4m3 first; w_in is quantized, [S, N, H, D].
    """
    x = e4m3_rows(rows)
    parts = range(w_in.values.shape[1])
    each = [cut_product(*x, *matrix_of(w_in, slot, part)) for part in parts]
    return tuple(np.stack(arrays, axis=1) for arrays in zip(*each, strict=True))


def e4m3_rows(rows):
    """Values and scales of rows, in float64."""
    values, scales = jax.jit(quantize_rows)(np.asarray(rows, np.float32))
    return np.asarray(values).astype(np.float64), np.asarray(scales, np.float64)


def matrix_of(q, *index):
    """Values and scales of one quantized matrix, in float64."""
    values, scales = np.asarray(q.values[index]), np.asarray(q.scales[index])
    return values.astype(np.float64), scales.astype(np.float64)


def other_roundings(hidden, error):
    """What a hidden value [R, H] becomes more or less if it is rounded to its other neighbour.

    0 where it lies farther from the middle than six times the standard deviation of its `error`
    [R, H]. A block's scale follows its largest value, whose error shifts all others.
    """
    rows, width = hidden.shape
    hidden, error = (np.pad(a, ((0, 0), (0, -width % BLOCK))) for a in (hidden, error))
    blocks = np.abs(hidden).reshape(rows, hidden.shape[1] // BLOCK, BLOCK)
    at = blocks.argmax(-1) + BLOCK * np.arange(blocks.shape[1])
    largest = np.maximum(blocks.max(-1), 1e-30)
    of_scale = np.take_along_axis(error, at, 1) / largest
    scale, of_scale = (np.repeat(a, BLOCK, axis=1) for a in (largest / 448.0, of_scale))
    scaled = np.clip(hidden / scale, -448.0, 448.0)
    near = scaled.astype(E4M3)
    towards = np.where(scaled >= near.astype(np.float64), 448.0, -448.0).astype(E4M3)
    near, far = (a.astype(np.float64) for a in (near, np.nextafter(near, towards)))
    distance = np.abs(scaled - (near + far) / 2)
    unsure = distance < 6 * np.hypot(error / scale, of_scale * np.abs(scaled))
    return np.where(unsure, (far - near) * scale, 0.0)[:, :width]


def without_flips(got, exact, tokens, slots, changes, w_out):
    """An output without the other roundings that explain its error, the largest first.

    tokens [R] and slots [R] of the rows; changes [R, H] of their hidden values, times their
    scores; w_out [S, H, D].
    """
    left = np.asarray(got, np.float64) - exact
    sizes = np.abs(changes) * np.linalg.norm(w_out, axis=-1)[slots]
    for row, h in zip(*np.unravel_index(np.argsort(-sizes, axis=None), sizes.shape), strict=True):
        if not sizes[row, h]:
            break
        step = changes[row, h] * w_out[slots[row], h]
        if left[tokens[row]] @ step > step @ step / 2:
            left[tokens[row]] -= step
    return exact + left
