"""Which pages of one device's key-value cache are free, held, or kept for later (host only).

A page is in one of three states: *free*, content of no use; *held* by one or more texts; or *kept*:
held by none, but full of positions whose key is known, for a later text that begins alike. Kept
pages are given up, the longest unused first, when there are no free ones.
The key of a page names all tokens up to its end, so equal keys mean equal content (vLLM's automatic
prefix caching, docs.vllm.ai/en/latest/design/prefix_caching).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["PagePool", "page_keys"]


def page_keys(tokens: Sequence[int], page_len: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """The keys of the full pages of a text, in order.

    Args:
        tokens: the whole text so far.
        page_len: positions of a page.
        before: the keys of its first pages, if they are known; they are not computed again.
    """
    keys = list(before)
    for start in range(len(keys) * page_len, len(tokens) - page_len + 1, page_len):
        content = np.asarray(tokens[start : start + page_len], np.int32).tobytes()
        parent = keys[-1] if keys else b""
        # 128 bits of a cryptographic hash: nobody finds two texts with one key.
        keys.append(blake2b(parent + content, digest_size=16).digest())
    return keys


class PagePool:
    """The pages of one device.

    Args:
        pages: how many there are; their ids count from 0.
    """

    def __init__(self, pages: int):
        self.size = pages
        self._free = list(range(pages))[::-1]  # the lowest ids first
        self._holders = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can give: free or kept."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that texts hold."""
        return self.size - self.available

    @property
    def kept(self) -> int:
        """Pages that no text holds and a later one may use again."""
        return len(self._kept)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of a text; `hold` them to use them."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def room_beside(self, pages: Sequence[int]) -> int:
        """Pages that `take` can still give once these are held."""
        return self.available - sum(page in self._kept for page in pages)

    def take(self, count: int) -> list[int]:
        """Pages for a text to write to, held once; there must be so many available."""
        if count > self.available:
            raise AssertionError(f"{count} pages asked for, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more text uses these pages; it only reads them."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """A text ended that held these, in order of position.

        Of a text that nobody continues the end goes first, so that its beginning serves longest.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] < 0:
                raise AssertionError(f"page {page} was released more often than held")
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: bytes) -> None:
        """Makes a full page known, unless another with the same content is."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
