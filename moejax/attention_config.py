"""Configuration of attention: heads, rotary positions, windows, sinks, latent keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moejax.errors import UserError

__all__ = ["AttentionConfig", "LatentConfig", "YarnConfig"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class YarnConfig:
    """Rotary positions stretched to a longer context (YaRN, arXiv 2309.00071 §3).

    Wavelengths that turn more than `beta_fast` times in the original context stay as they are,
    those that turn less than `beta_slow` times are stretched by `factor`, between them there is a
    ramp. As in Hugging Face transformers' `_compute_yarn_parameters`.

    Attributes:
        factor: new context over the original one.
        original_context: tokens of the original context.
        beta_fast: turns from where on nothing is stretched.
        beta_slow: turns up to which all is.
        truncate: round the ends of the ramp outwards to whole dimensions.
        mscale: with `mscale_all_dim`, cosines and sines are multiplied by the quotient of
            m(mscale) and m(mscale_all_dim), m(x) = 0.1·x·ln(factor) + 1 (DeepSeek); without, by
            m(1).
        mscale_all_dim: the scale of attention's logits is multiplied by m(mscale_all_dim)².
        attention_factor: multiplies cosines and sines in the place of what is said above.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"yarn factor={self.factor}: must be at least 1")
        _require(
            self.original_context >= 1,
            f"yarn original_context={self.original_context}: must be at least 1 token",
        )
        _require(
            self.beta_fast > self.beta_slow > 0,
            f"yarn beta_fast={self.beta_fast}, beta_slow={self.beta_slow}: the fast one must be "
            "the larger, and both greater than 0",
        )

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def logit_scale(self) -> float:
        """What attention's logits are multiplied by besides 1/√h."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _m(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LatentConfig:
    """Keys and values expanded from one short vector a token (MLA, arXiv 2405.04434 §2.1).

    A head's query and key are `nope_dim` numbers without positions and `rope_dim` rotated ones;
    the rotated part of the key is shared by all heads. Only the vector and that part are cached.

    Attributes:
        rank: width of the vector from which all heads' keys and values come.
        rope_dim: rotated width of a query and key, even.
        value_dim: width of a value.
        query_rank: width of the vector from which the queries come; None: straight from the input.
    """

    rank: int = 512
    rope_dim: int = 64
    value_dim: int = 128
    query_rank: int | None = None

    def __post_init__(self) -> None:
        for name in "rank", "rope_dim", "value_dim":
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: at least 1")
        _require(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim}: must be even to be rotated")
        _require(
            self.query_rank is None or self.query_rank >= 1,
            f"query_rank={self.query_rank}: at least 1, or None",
        )


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864).

    Attributes:
        num_heads: N, query heads.
        num_kv_heads: heads of keys and values; divides `num_heads`.
        head_dim: h, width of a query or key, even. With `latent` its rotated part is the last
            `latent.rope_dim` of it.
        rope_theta: base of the rotary wavelengths.
        rope_interleaved: rotated pairs lie side by side (DeepSeek), not half a head apart.
        yarn: stretches the rotary positions; None leaves them.
        qk_norm: RMSNorm over each `head` of q and k before the rotation (Qwen3); `full` norms over
            all heads together (OLMoE).
        bias: queries, keys and values have a bias (Qwen2-MoE, gpt-oss).
        output_bias: so has the output projection (gpt-oss).
        sinks: every head has a learned logit that takes part in the softmax and adds no value
            (gpt-oss; arXiv 2309.17453).
        window: a token sees this many positions, its own included (arXiv 2004.05150); None: all.
        latent: keys and values from one short vector (DeepSeek-V2, -V3); None: each of its own.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rope_interleaved: bool = False
    yarn: YarnConfig | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    window: int | None = None
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        _require(
            self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(
            self.latent is not None or self.head_dim % 2 == 0,
            f"head_dim={self.head_dim}: must be even for rotary positions",
        )
        _require(
            self.window is None or self.window >= 1,
            f"window={self.window}: a token sees at least itself; None for all before it",
        )
        if self.latent is not None:
            self._check_latent(self.latent)

    def _check_latent(self, latent: LatentConfig) -> None:
        _require(
            self.num_kv_heads == self.num_heads,
            f"num_kv_heads={self.num_kv_heads} with latent: every query head has a key of its "
            f"own; set it to num_heads={self.num_heads}",
        )
        _require(
            self.head_dim > latent.rope_dim,
            f"head_dim={self.head_dim} with rope_dim={latent.rope_dim}: the rotated part is a "
            "part of a head; make the head wider",
        )
        for name in "qk_norm", "bias", "output_bias", "sinks":
            _require(
                getattr(self, name) in (False, "none"),
                f"{name}={getattr(self, name)} with latent: latent attention has none; leave it",
            )

    @property
    def rotated_dim(self) -> int:
        """Columns of a query or key that are rotated."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def scale(self) -> float:
        """Scale of the logits."""
        return self.head_dim**-0.5 * (1.0 if self.yarn is None else self.yarn.logit_scale)
