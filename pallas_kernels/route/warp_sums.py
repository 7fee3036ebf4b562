"""Adding up the sums of a cluster's warps through distributed shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.hopper.simt import LANES

__all__ = ["Sums"]

PADDING = 8  # words of a row, so that lanes of a quad and of its neighbours write other banks

# $0: thread, $1: mailbox. Its first phase ends when as many bytes have come as all blocks send.
OPEN = """{{
.reg .pred first;
setp.eq.u32 first, $0, 0;
@first mbarrier.init.shared::cta.b64 [$1], 1;
@first fence.mbarrier_init.release.cluster;
@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {expected};
barrier.cluster.arrive.relaxed.aligned;
}}"""
WAIT_FOR_OPENING = "barrier.cluster.wait.acquire.aligned;"
# $0: target and $1: mailbox, as in this block; $2: block of the cluster; then the words
SEND = """{{
.reg .b32 target, mailbox;
mapa.shared::cluster.u32 target, $0, $2;
mapa.shared::cluster.u32 mailbox, $1, $2;
st.async.shared::cluster.mbarrier::complete_tx::bytes.v{count}.b32 [target], {words}, [mailbox];
}}"""
WAIT_FOR_MAIL = """{
.reg .pred done;
again:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;
@!done bra again;
}"""


def _synchronize(code: str, *operands: Any) -> None:
    """Code that the compiler moves no access to memory across and does not duplicate."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    together: dict[str, Any] = (
        {"convergent": True} if hasattr(llvm.InlineAsmOp, "convergent") else {}
    )
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [operand.value for operand in operands],
        code,
        ",".join([*["r"] * len(operands), "~{memory}"]),
        has_side_effects=True,
        **together,
    )


def _address(m: Any, ref: Any, index: Any = 0) -> Any:
    from pallas_kernels.hopper.simt_emit import Word

    return Word(m.integer_address(ref, index))


@dataclass(frozen=True)
class Sums:
    """Each slice has a sum [height, columns]; each block adds up some rows of all slices.

    height, columns: of the tile.
    blocks: of the cluster, a divisor of `height`.
    deep: slices of a block, each a warp's.
    """

    height: int
    columns: int
    blocks: int
    deep: int

    @property
    def rows(self) -> int:
        """That a block adds up."""
        return self.height // self.blocks

    @property
    def width(self) -> int:
        """Words from a row to the next one."""
        return self.columns + PADDING

    @property
    def words(self) -> int:
        """Of shared memory for what a block receives."""
        return self.blocks * self.deep * self.rows * self.width

    def open(self, m: Any, mailbox: Any) -> None:
        """Says that this block can receive; all its threads call it, once."""
        if self.blocks > 1:
            expected = self.deep * self.height * self.columns * 4
            _synchronize(OPEN.format(expected=expected), m.thread, _address(m, mailbox))

    def wait_for_opening(self) -> None:
        """Until all blocks of the cluster can receive."""
        if self.blocks > 1:
            _synchronize(WAIT_FOR_OPENING)

    def wait(self, m: Any, mailbox: Any) -> None:
        """Until all has come."""
        if self.blocks > 1:
            _synchronize(WAIT_FOR_MAIL, _address(m, mailbox))
        else:
            m.wait_for_block()

    def place(self, slice_: Any, row: Any, column: Any) -> tuple[Any, Any]:
        """The block that adds up an element of a slice's sum, and the word it comes to."""
        return row // self.rows, (row % self.rows + slice_ * self.rows) * self.width + column

    def send(
        self,
        m: Any,
        received: Any,
        mailbox: Any,
        slice_: Any,
        row: Any,
        column: Any,
        words: Sequence[Any],
    ) -> None:
        """Sends neighbouring columns of a row, 2 or a multiple of 4."""
        block, word = self.place(slice_, row, column)
        for first in range(0, len(words), 4):
            some = words[first : first + 4]
            if self.blocks == 1:
                for i, value in enumerate(some):
                    m.store(received, word + (first + i), value)
                continue
            names = ", ".join(f"${i + 3}" for i in range(len(some)))
            code = SEND.format(count=len(some), words=f"{{{names}}}")
            target = _address(m, received, word + first)
            _synchronize(code, target, _address(m, mailbox), block, *some)

    def add_up(
        self, m: Any, received: Any, out: Any, row: Any, column: Any, *, rows: int, experts: int
    ) -> None:
        """A block's threads add up what it received, in the slices' order.

        Args:
            m: the machine.
            received: float32 words.
            out: float32 words [rows · experts].
            row, column: where what the block adds up begins; rows past the end are left out.
            rows, experts: of the output.
        """
        elements, threads = self.rows * self.columns, self.deep * LANES
        for first in range(0, elements, threads):
            element = m.thread + first
            own_row, own_column = element // self.columns, element % self.columns
            wanted = (element < elements) & (row + own_row < rows)
            values = []
            for slice_ in range(self.blocks * self.deep):
                _, word = self.place(slice_, own_row, own_column)
                values.append(m.load(received, word, wanted))
            total = values[0]
            for value in values[1:]:
                total = m.float_add(total, value)
            m.store(out, (row + own_row) * experts + column + own_column, total, wanted)
