"""Tables of names: where each of our tensors lies in a checkpoint of Hugging Face transformers.

A `Rule` says so for a name, or for one name of every layer, and serves both directions:

    Rule("params/layers.{l}.attention.w_q", "model.layers.{l}.self_attn.q_proj.weight",
         "(N h) D -> D N h")

On the left of the arrow are the dimensions of their tensor, on the right those of ours. `(N h)` is
one dimension of theirs and two of ours, N the slower one; `1` is a dimension that we lack. A name
that is on the right only counts tensors of theirs: with `{e}` in their name and `e` on the right,
every expert has a tensor of its own.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Binding", "Rule", "bind"]

_BLOCK = 1 << 22  # elements of a job: what is widened on the way stays small
_STRIP = 16
_THREADS = min(os.cpu_count() or 1, 8)
_SMALL = 2**28
"""Bytes of a whole array that one thread copies: often it is one of several."""


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    ours: our name, `{l}` for the layer.
    theirs: their name; `{l}` likewise, other braces for names on the right of `axes` only.
    axes: dimensions of theirs and of ours.
    n: the words that `{n}` stands for, in our order.
    layers: the layers that have it; None for a name outside of the layers.
    """

    ours: str
    theirs: str
    axes: str
    n: tuple[str, ...] = ()
    layers: range | None = None


def bind(rules: Iterable[Rule], sizes: Mapping[str, int]) -> dict[str, Binding]:
    """The rules of a model by our names, layer by layer.

    Args:
        rules: the table.
        sizes: dimensions of theirs that differ from ours: `V`, where our vocabulary is padded.
    """
    bindings = {}
    for rule in rules:
        for layer in (None,) if rule.layers is None else rule.layers:
            ours, theirs = rule.ours, rule.theirs
            if layer is not None:
                ours, theirs = (name.replace("{l}", str(layer)) for name in (ours, theirs))
            bindings[ours] = Binding(theirs, *_parse(rule.axes), rule.n, dict(sizes))
    return bindings


@dataclass(frozen=True)
class Binding:
    """Where one of our tensors lies.

    theirs: name, or a template of names.
    left: their dimensions, each as its parts, slowest first; () for one that we lack.
    right: our dimensions.
    n: words for `{n}`.
    sizes: dimensions of theirs that are not ours.
    """

    theirs: str
    left: tuple[tuple[str, ...], ...]
    right: tuple[str, ...]
    n: tuple[str, ...]
    sizes: Mapping[str, int]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of each of their tensors, from the shape of ours."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[part] for part in group) for group in self.left)

    def names(self, shape: Sequence[int]) -> list[str]:
        """Of all their tensors, from the shape of ours."""
        counts = [range(size) for name, size in zip(self.right, shape) if name in self._counted]
        return [self._name(at) for at in itertools.product(*counts)]

    def read(
        self,
        tensors: Mapping[str, Any],
        shape: Sequence[int],
        index: Sequence[slice],
        dtype: Any,
    ) -> np.ndarray:
        """A part of our tensor; of theirs only the bytes of that part are read.

        Args:
            tensors: theirs by name, anything with `shape` and slices.
            shape: of our whole tensor.
            index: the part, a slice with step 1 for each dimension.
            dtype: of the result.
        """
        limits = dict(zip(self.right, shape)) | {k: v for k, v in self.sizes.items()}
        spans, part = {}, []
        for name, size, wanted in zip(self.right, shape, index):
            start, stop, _ = wanted.indices(size)
            part.append(stop - start)
            spans[name] = range(min(start, limits[name]), min(stop, limits[name]))
        out = np.zeros(part, dtype)  # rows of the vocabulary's padding stay 0
        target = out[tuple(slice(0, len(spans[name])) for name in self.right)]
        sizes, jobs = self._sizes(shape), []
        for at in itertools.product(*(spans[name] for name in self._counted)):
            coordinate = dict(zip(self._counted, at))
            place = tuple(
                coordinate[n] - spans[n].start if n in coordinate else slice(None)
                for n in self.right
            )
            source, goal = tensors[self._name(at)], target[place]
            jobs += [(source, block, sizes, goal) for block in self._blocks(spans, goal.size)]
        if len(jobs) < 2 or out.nbytes < _SMALL:
            for job in jobs:
                self._copy(spans, *job)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(lambda job: self._copy(spans, *job), jobs))
        return out

    def split(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors by name, from our whole one; views where that is possible."""
        array = array[tuple(slice(self.sizes.get(name)) for name in self.right)]
        counted = [self.right.index(name) for name in self._counted]
        counts = (range(array.shape[i]) for i in counted)
        kept = [name for name in self.right if name not in self._counted]
        order = [kept.index(part) for group in self.left for part in group]
        shape = self.shape(array.shape)
        for at in itertools.product(*counts):
            place: list[Any] = [slice(None)] * array.ndim
            for axis, position in zip(counted, at):
                place[axis] = position
            yield self._name(at), array[tuple(place)].transpose(order).reshape(shape)

    @property
    def _counted(self) -> list[str]:
        parts = {part for group in self.left for part in group}
        return [name for name in self.right if name not in parts]

    def _name(self, at: Sequence[int]) -> str:
        words = {name: self.n[i] if name == "n" else str(i) for name, i in zip(self._counted, at)}
        return self.theirs.format(**words)

    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.right, shape)) | dict(self.sizes)

    def _blocks(self, spans: Mapping[str, range], elements: int) -> list[range]:
        """The span of the slowest dimension of theirs, cut so that copying needs little memory."""
        span = spans[self._outer] if self._outer else range(1)
        step = max(1, _BLOCK * len(span) // max(elements, 1))
        return [
            range(start, min(start + step, span.stop))
            for start in range(span.start, span.stop, step)
        ]

    @property
    def _outer(self) -> str | None:
        return next((group[0] for group in self.left if group), None)

    def _copy(
        self,
        spans: Mapping[str, range],
        source: Any,
        block: range,
        sizes: Mapping[str, int],
        out: np.ndarray,
    ) -> None:
        """Copies a block of the part `spans` of one of their tensors."""
        outer = self._outer
        here = {**spans, outer: block} if outer else spans
        # Of a dimension with parts the slowest is cut here, the others after the reshape.
        slices, shape, rest = [], [], []
        for group in self.left:
            inner = math.prod(sizes[part] for part in group[1:])
            first = here[group[0]] if group else range(1)
            slices.append(slice(first.start * inner, first.stop * inner))
            shape += [len(here[part]) if part == group[0] else sizes[part] for part in group]
            rest += [
                slice(None) if part == group[0] else slice(here[part].start, here[part].stop)
                for part in group
            ]
        order = [part for group in self.left for part in group]
        kept = [name for name in self.right if name in order]
        piece = source[tuple(slices)].reshape(shape)[tuple(rest)]
        # Rounded where it lies in a row, which is quick.
        piece = piece.astype(out.dtype, copy=False)
        piece = piece.transpose([order.index(name) for name in kept])
        start = spans[outer].start if outer else 0
        at = slice(block.start - start, block.stop - start)
        place = tuple(at if name == outer else slice(None) for name in kept)
        _assign(out[place], piece)


def _assign(out: np.ndarray, piece: np.ndarray) -> None:
    """Copies numbers of one dtype; a transpose in strips, which stay in the processor's cache."""
    if out.dtype.kind == "V":
        # numpy copies numbers that it does not know one by one; their bits it knows.
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, piece = out.view(bits), piece.view(bits)
    if piece.ndim < 2 or piece.strides[-1] == piece.itemsize:
        out[...] = piece
        return
    for start in range(0, out.shape[-1], _STRIP):
        strip = slice(start, start + _STRIP)
        out[..., strip] = piece[..., strip]


def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    left, right = axes.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    parts = [tuple(group.split()) if group else (word,) for group, word in groups]
    return tuple(() if part == ("1",) else part for part in parts), tuple(right.split())
