"""What offloading did: uses of experts, what travelled, what was waited for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OffloadStats", "Uses"]


@dataclass
class Uses:
    """Uses of experts; an expert counts once for each layer and step that uses it.

    held: that were on the device.
    early: that were under way, or there, because they had been guessed.
    missed: that had to be asked for.
    low: of all these, those that computed with copies of fewer bits.
    """

    held: int = 0
    early: int = 0
    missed: int = 0
    low: int = 0

    @property
    def total(self) -> int:
        """All uses."""
        return self.held + self.early + self.missed

    @property
    def hit_rate(self) -> float:
        """Share of uses that were held or guessed; 0 without uses."""
        return (self.held + self.early) / self.total if self.total else 0.0


@dataclass(frozen=True)
class OffloadStats:
    """What offloading did so far.

    slots, experts: on the device and in all, of all layers.
    layers: that have experts.
    decode, prefill: uses of steps that decode, and of those with prompts.
    decoded_tokens: of the steps that decode.
    decode_stall_seconds, prefill_stall_seconds: that the host waited for weights.
    asked_bytes: of experts that a layer lacked.
    guessed_bytes: of guesses.
    vain_bytes: of guesses that were not used.
    read_bytes: of experts, from the model's files or the system's cache of them; 0 where all are in
        host memory.
    """

    slots: int
    experts: int
    layers: int
    decode: Uses
    prefill: Uses
    decoded_tokens: int
    decode_stall_seconds: float
    prefill_stall_seconds: float
    asked_bytes: int
    guessed_bytes: int
    vain_bytes: int
    read_bytes: int = 0

    @property
    def stall_ms_per_token(self) -> float:
        """Milliseconds that a decoded token waited for weights; 0 before any."""
        return 1e3 * self.decode_stall_seconds / max(self.decoded_tokens, 1)

    def __str__(self) -> str:
        """A line for the person who started the program."""
        decode = self.decode
        early = decode.early / decode.total if decode.total else 0.0
        moved = self.asked_bytes + self.guessed_bytes
        low = ""
        if self.decode.low + self.prefill.low:
            uses = self.decode.total + self.prefill.total
            share = (self.decode.low + self.prefill.low) / uses
            low = f", {share:.1%} of all uses in 8 bits"
        read = f", {self.read_bytes / 1e9:.2f} GB read from files" if self.read_bytes else ""
        return (
            f"offload: {self.slots / self.layers:.4g} of {self.experts / self.layers:.4g} experts "
            f"of a layer on the device; decoding hit {decode.hit_rate:.1%} ({early:.1%} guessed "
            f"early), stall {self.stall_ms_per_token:.2f} ms a token; {moved / 1e9:.2f} GB came "
            f"from the host, {self.vain_bytes / 1e9:.2f} of them in vain{low}{read}"
        )
