"""Tables of names: reading any part of a tensor and writing it, against slices made by hand."""

import ml_dtypes
import numpy as np
import pytest

from moejax.families import table
from moejax.families.quantized import BlockScaled, Mxfp4
from moejax.families.table import Rule, bind

D, N, H_HEAD, E, H = 12, 4, 6, 5, 10


def binding(theirs, axes, **sizes):
    rule = Rule("a.{l}", theirs, axes, n=("gate", "up"), layers=range(3, 4))
    return bind([rule], sizes)["a.3"]


def random(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def any_part(rng, shape):
    return tuple(slice(*sorted(int(i) for i in rng.integers(0, n + 1, 2))) for n in shape)


class Counted:
    """A tensor that counts the numbers that were asked for."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


# Of each: axes, their shape, our shape, and ours made from theirs by hand.
PLAIN = {
    "(N h) D -> D N h": (
        (N * H_HEAD, D),
        (D, N, H_HEAD),
        lambda w: np.stack([w[i * H_HEAD : (i + 1) * H_HEAD].T for i in range(N)], axis=1),
    ),
    "D (N h) -> N h D": ((D, N * H_HEAD), (N, H_HEAD, D), lambda w: w.T.reshape(N, H_HEAD, D)),
    "E D (H n) -> E D n H": (
        (E, D, 2 * H),
        (E, D, 2, H),
        lambda w: np.stack([w[..., ::2], w[..., 1::2]], axis=2),
    ),
    "1 D -> D": ((1, D), (D,), lambda w: w[0]),
    "D -> D": ((D,), (D,), lambda w: w),
    "E H D -> E H D": ((E, H, D), (E, H, D), lambda w: w),
}


@pytest.mark.parametrize("axes", PLAIN)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block", [1 << 22, 7])
def test_one_tensor(rng, monkeypatch, axes, dtype, block):
    monkeypatch.setattr(table, "_BLOCK", block)
    theirs, ours, by_hand = PLAIN[axes]
    source = random(rng, *theirs, dtype=dtype)
    rule = binding("x.{l}.w", axes)
    assert rule.names(ours) == ["x.3.w"] and rule.shape(ours) == theirs
    whole = by_hand(source)
    for out in (np.float32, ml_dtypes.bfloat16):
        for index in [(slice(None),) * len(ours), *(any_part(rng, ours) for _ in range(10))]:
            part = rule.read({"x.3.w": source}, ours, index, out)
            assert part.dtype == out
            np.testing.assert_array_equal(part, whole[index].astype(out))
    ((name, back),) = rule.split(whole)
    assert name == "x.3.w"
    np.testing.assert_array_equal(back, source)


@pytest.mark.parametrize("block", [1 << 22, 7])
def test_a_tensor_for_each_expert_and_projection(rng, monkeypatch, block):
    monkeypatch.setattr(table, "_BLOCK", block)
    rule = binding("x.{l}.{e}.{n}.w", "H D -> e D n H")
    shape = (E, D, 2, H)
    sources = {f"x.3.{e}.{n}.w": random(rng, H, D) for e in range(E) for n in ("gate", "up")}
    assert rule.names(shape) == list(sources) and rule.shape(shape) == (H, D)
    whole = np.zeros(shape, np.float32)
    for e in range(E):
        for n, word in enumerate(("gate", "up")):
            whole[e, :, n] = sources[f"x.3.{e}.{word}.w"].T
    for index in [(slice(None),) * 4, *(any_part(rng, shape) for _ in range(20))]:
        np.testing.assert_array_equal(rule.read(sources, shape, index, np.float32), whole[index])
    back = dict(rule.split(whole))
    assert back.keys() == sources.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, sources[name])


def test_only_the_part_is_read(rng):
    rule = binding("x.{e}.{n}", "H D -> e D n H")
    shape = (E, D, 2, H)
    sources = {f"x.{e}.{n}": Counted(random(rng, H, D)) for e in range(E) for n in ("gate", "up")}
    rule.read(sources, shape, (slice(1, 3), slice(0, D), slice(0, 2), slice(2, 7)), np.float32)
    read = {name: source.read for name, source in sources.items() if source.read}
    assert read == {f"x.{e}.{n}": 5 * D for e in (1, 2) for n in ("gate", "up")}
    heads = Counted(random(rng, N * H_HEAD, D))
    rule = binding("x", "(N h) D -> D N h")
    rule.read({"x": heads}, (D, N, H_HEAD), (slice(0, 5), slice(1, 2), slice(0, 6)), np.float32)
    assert heads.read == 5 * H_HEAD


def test_the_vocabulary_is_padded_and_cut(rng):
    known, padded = 9, 16
    source = random(rng, known, D)
    rule = binding("w", "V D -> D V", V=known)
    assert rule.shape((D, padded)) == (known, D)
    whole = np.zeros((D, padded), np.float32)
    whole[:, :known] = source.T
    cuts = [slice(0, 4), slice(8, 12), slice(12, 16), slice(0, 16), slice(9, 16)]
    for cut in cuts:
        index = (slice(2, 7), cut)
        part = rule.read({"w": source}, (D, padded), index, np.float32)
        np.testing.assert_array_equal(part, whole[index])
    whole[:, known:] = np.nan  # what stands in the padding is not written
    ((_, back),) = rule.split(whole)
    np.testing.assert_array_equal(back, source)


# --- numbers of few bits ----------------------------------------------------------------------


def test_float8_with_scales(rng):
    shape, block = (37, 29), (16, 8)
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    bits[(bits & 127) == 127] = 0  # not-a-numbers
    weight = bits.view(ml_dtypes.float8_e4m3fn)
    scales = np.exp(rng.normal(size=(3, 4))).astype(np.float32)
    expected = np.array(
        [
            [np.float32(weight[i, j]) * scales[i // 16, j // 8] for j in range(shape[1])]
            for i in range(shape[0])
        ]
    )
    array = BlockScaled("w", weight, scales, block)
    assert (array.shape, array.dtype) == (shape, np.float32)
    for index in [(slice(None),) * 2, *(any_part(rng, shape) for _ in range(30))]:
        np.testing.assert_array_equal(array[index], expected[index])


def e2m1(code):
    """Value of a 4-bit number: sign, two bits of exponent, one of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def test_four_bits_with_powers_of_two(rng):
    experts, outputs, groups = 3, 6, 2
    blocks = rng.integers(0, 256, (experts, outputs, groups, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (experts, outputs, groups), dtype=np.uint8)
    expected = np.zeros((experts, groups * 32, outputs), np.float32)
    for e, o, g, b in np.ndindex(blocks.shape):
        for half, code in enumerate((blocks[e, o, g, b] & 15, blocks[e, o, g, b] >> 4)):
            value = e2m1(int(code)) * 2.0 ** (int(scales[e, o, g]) - 127)
            expected[e, g * 32 + 2 * b + half, o] = value
    array = Mxfp4("w", blocks, scales)
    assert (array.shape, array.dtype) == (expected.shape, np.float32)
    for index in [(slice(None),) * 3, *(any_part(rng, expected.shape) for _ in range(30))]:
        np.testing.assert_array_equal(array[index], expected[index])


def test_four_bits_as_transformers_reads_them(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (2, 6, 3), dtype=np.uint8)
    expected = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(Mxfp4("w", blocks, scales)[(slice(None),) * 3], expected)
