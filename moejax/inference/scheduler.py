"""Which texts run next, on which device and in which pages: the host's decisions, without arrays.

Texts wait in one queue, first come, first served. A text is admitted to a device that has a free
slot and pages for its prompt; pieces of the prompts of a device take turns, so that a short prompt
need not wait for a long one to end. Then the text decodes, one token a step, and takes a page
whenever it has filled the last. When a device has no page left its youngest text is preempted: it
gives back its pages and waits again, at the head of the queue, all its tokens now its prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from moejax.inference.pages import PagePool, page_keys
from moejax.inference.request import Finish
from moejax.inference.shapes import Shape, Shapes
from moejax.inference.texts import Text

__all__ = ["Plan", "Scheduler", "Work"]


@dataclass(frozen=True)
class Work:
    """One row of a step.

    text: what it continues.
    start, count: positions that the step fills.
    draws: whether it draws the text's next token; a prompt's last piece does, and decoding.
    first: the first piece since the text was admitted.
    """

    text: Text
    start: int
    count: int
    draws: bool = True
    first: bool = False


@dataclass(frozen=True)
class Plan:
    """A step: its shape, and for each device its rows."""

    shape: Shape
    rows: list[list[Work]]


class _Home:
    """What the host knows of one device: its pages, slots and texts."""

    def __init__(self, pages: int, slots: int):
        self.pool = PagePool(pages)
        self.slots = list(range(slots))[::-1]
        self.prefilling: list[Text] = []
        self.decoding: list[Text] = []

    @property
    def texts(self) -> list[Text]:
        return self.prefilling + self.decoding


class Scheduler:
    """The texts of an engine.

    Args:
        shapes: of the steps.
        devices: that rows are split over (data × expert).
        pages: of each device.
        page_len: positions of a page.
        reuse: keep full pages for texts that begin alike.
        reserve: a text reserves at its start all the pages it may come to need, so that none is
            ever preempted.
    """

    def __init__(
        self,
        shapes: Shapes,
        devices: int,
        pages: int,
        page_len: int,
        *,
        reuse: bool,
        reserve: bool,
    ):
        self._shapes = shapes
        self._page_len = page_len
        self._reuse = reuse
        self._reserve = reserve
        self._homes = [_Home(pages, shapes.rows) for _ in range(devices)]
        self._waiting: deque[Text] = deque()
        self.preemptions = 0
        self.prompt_tokens = 0
        self.reused_tokens = 0

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return sum(len(home.texts) for home in self._homes)

    @property
    def waiting(self) -> int:
        """Texts that have none."""
        return len(self._waiting)

    @property
    def pools(self) -> list[PagePool]:
        """The pages of each device."""
        return [home.pool for home in self._homes]

    def submit(self, texts: Sequence[Text]) -> None:
        """Texts of one prompt join the queue; all but the first wait for it to know the prompt."""
        if self._reuse:
            texts[0].siblings = texts[1:]
            texts = texts[:1]
        self._waiting.extend(texts)

    def finish(self, text: Text, finish: Finish) -> None:
        """Ends a text and gives back what it holds."""
        text.finish = finish
        if text.device is not None:
            self._leave(text)
        elif text in self._waiting:
            self._waiting.remove(text)
        self._free_siblings(text)

    def learn(self, text: Text) -> None:
        """Makes known the full pages of a text whose tokens the host knows."""
        full = min(text.filled, len(text.tokens)) // self._page_len
        if not self._reuse or text.device is None or full <= text.named:
            return
        pool = self._homes[text.device].pool
        if len(text.keys) < full:
            text.keys = page_keys(text.tokens, self._page_len, text.keys)
        for i in range(text.named, full):
            pool.name(text.pages[i], text.keys[i])
        text.named = full

    # --- decoding -----------------------------------------------------------------------------

    def lacks_pages(self) -> bool:
        """Whether a device has too few pages for the next token of its texts."""
        return any(self._shortage(home) > 0 for home in self._homes)

    def preempt(self) -> None:
        """Makes texts wait until there are pages enough; no program may be under way."""
        for home in self._homes:
            while self._shortage(home) > 0:
                text = max(home.texts, key=lambda text: text.age)
                assert text.pending == 0
                self._leave(text)
                self._wait([text])
                self.preemptions += 1

    def plan_decode(self) -> Plan | None:
        """One more token for each text whose prompt has been run; None if there is no such text."""
        rows = [[self._next(text) for text in self._ready(home)] for home in self._homes]
        if not any(rows):
            return None
        for home, works in zip(self._homes, rows):
            for work in works:
                if self._is_new_page(work.text):
                    work.text.pages += home.pool.take(1)
                work.text.filled += 1
                work.text.pending += 1
        return Plan(self._shapes.decode(max(map(len, rows)), self._table(rows)), rows)

    def _next(self, text: Text) -> Work:
        return Work(text, text.filled, 1)

    def _ready(self, home: _Home) -> list[Text]:
        return [text for text in home.decoding if text.total < text.limit]

    def _is_new_page(self, text: Text) -> bool:
        return text.filled == len(text.pages) * self._page_len

    def _shortage(self, home: _Home) -> int:
        return sum(map(self._is_new_page, self._ready(home))) - home.pool.available

    def _table(self, rows: list[list[Work]]) -> int:
        """Pages of the longest row."""
        last = max(work.start + work.count for works in rows for work in works)
        return -(-last // self._page_len)

    # --- prompts ------------------------------------------------------------------------------

    def plan_prefill(self) -> Plan | None:
        """Pieces of prompts, a bounded number of tokens on each device; None if none waits."""
        self._admit()
        if not any(home.prefilling for home in self._homes):
            return None
        size = max(self._shapes.pieces, key=self._tokens_of_pieces)
        most = self._shapes.pieces[size]
        rows = [
            [self._piece(text, size) for text in home.prefilling[:most]] for home in self._homes
        ]
        begins = all(work.start == 0 for works in rows for work in works)
        for home, works in zip(self._homes, rows):
            unfinished = home.prefilling[len(works) :]
            for work in works:
                text = work.text
                text.filled += work.count
                self.prompt_tokens += work.count
                self.learn(text)
                if not work.draws:
                    unfinished.append(text)
                    continue
                text.pending = 1
                home.decoding.append(text)
                self._free_siblings(text)
            home.prefilling = unfinished
        most = max(map(len, rows))
        return Plan(self._shapes.prefill(most, size, self._table(rows), begins=begins), rows)

    def _tokens_of_pieces(self, size: int) -> int:
        """How many tokens of prompts a step with pieces of this size would run."""
        most = self._shapes.pieces[size]
        heads = [text for home in self._homes for text in home.prefilling[:most]]
        return sum(min(len(text.tokens) - text.filled, size) for text in heads)

    def _piece(self, text: Text, size: int) -> Work:
        count = min(len(text.tokens) - text.filled, size)
        last = text.filled + count == len(text.tokens)
        return Work(text, text.filled, count, draws=last, first=text.filled == text.reused)

    def _free_siblings(self, text: Text) -> None:
        self._wait([sibling for sibling in text.siblings if sibling.finish is None])
        text.siblings = ()

    def _wait(self, texts: Sequence[Text]) -> None:
        """Texts take the places in the queue that their age gives them."""
        if texts:
            self._waiting = deque(sorted([*texts, *self._waiting], key=lambda text: text.age))

    def _admit(self) -> None:
        while self._waiting:
            text = self._waiting[0]
            if self._reuse:
                text.keys = page_keys(text.tokens, self._page_len, text.keys)
            found = self._place(text)
            if found is None:
                return
            device, shared = found
            home = self._homes[device]
            self._waiting.popleft()
            home.pool.hold(shared)
            text.pages = [*shared, *home.pool.take(self._needs(text) - len(shared))]
            text.device, text.slot, text.started = device, home.slots.pop(), True
            text.named, text.filled = len(shared), len(shared) * self._page_len
            text.reused = text.filled
            self.reused_tokens += text.filled
            home.prefilling.append(text)

    def _place(self, text: Text) -> tuple[int, list[int]] | None:
        """The device to continue a text on and the pages of its beginning there."""
        needs = self._needs(text)
        # The last token is run again in any case: its logits are needed.
        keys = text.keys[: (len(text.tokens) - 1) // self._page_len] if self._reuse else []
        fewest = min(len(home.texts) for home in self._homes)
        # A step takes as long as the fullest device: a common beginning must not gather all there.
        most = fewest + max(1, self._shapes.rows // 4)
        best = None
        for device, home in enumerate(self._homes):
            count = len(home.texts)
            if not home.slots:
                continue
            shared = home.pool.match(keys)
            room = home.pool.room_beside(shared)
            # A page is left for each running text, or it would be preempted at once.
            spare = 0 if self._reserve else count
            if needs - len(shared) + spare > room:
                continue
            score = (count <= most, len(shared), -count, room, -device)
            if best is None or score > best[0]:
                best = score, device, shared
        return None if best is None else (best[1], best[2])

    def _needs(self, text: Text) -> int:
        return -(-(text.limit if self._reserve else len(text.tokens)) // self._page_len)

    def _leave(self, text: Text) -> None:
        """Gives back the slot and the pages of a text, and forgets where it was."""
        assert text.device is not None
        home = self._homes[text.device]
        home.pool.release(text.pages)
        home.slots.append(text.slot)
        (home.decoding if text in home.decoding else home.prefilling).remove(text)
        text.device, text.slot, text.pages = None, -1, []
