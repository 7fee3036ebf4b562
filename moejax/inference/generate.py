"""Generation of token ids: prefill and decoding with a key-value cache, on any mesh.

Shape letters: B rows of all devices together, S tokens of a prompt, M positions of the cache.
Both steps are compiled once for each bucket of (B, S, M): B is a power of two on every device, S
and M are powers of two, so that few programs serve all lengths. Rows without a request are masked:
no expert sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.inference.sampling import SamplingArrays, SamplingConfig, sample
from moejax.model.cache import KVCache, cache_specs, init_cache
from moejax.model.embedding import PADDING_LOGIT
from moejax.training.state import Blueprint
from sharding.collectives import all_gather
from sharding.mesh import TENSOR, TOKEN_AXES
from sharding.specs import specs_of

__all__ = ["Generated", "Generator", "bucket"]

_SMALLEST_PROMPT = 16
_SMALLEST_CACHE = 128
_ROWS = P(TOKEN_AXES)


@dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    tokens: int32 [n], the end-of-text id left out.
    reason: why it ended: the model ended the text, the caller stopped it, `max_tokens` were made,
        or the context was full.
    """

    tokens: np.ndarray
    reason: Literal["end", "stopped", "max_tokens", "context"]


def bucket(length: int, smallest: int, largest: int) -> int:
    """The least power of two that is at least `length` and `smallest`; at most `largest`."""
    return min(max(1 << (length - 1).bit_length(), smallest), largest)


class Generator:
    """Continues token ids with a model laid over a mesh.

    Args:
        blueprint: model and mesh.
        params: weights split by their use, as from `load_weights`.
        biases: selection biases, likewise.
        max_len: most tokens of a text, prompt included; None: the model's context.
        num_ids: ids from here on are never chosen; None: the model's vocabulary.

    Raises:
        UserError: `max_len` is longer than the model's context.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        params: Any,
        biases: Any,
        max_len: int | None = None,
        num_ids: int | None = None,
    ):
        config = blueprint.config
        self.max_len = config.max_context if max_len is None else max_len
        if not 1 <= self.max_len <= config.max_context:
            raise UserError(
                f"max_len={max_len}: must lie between 1 and max_context={config.max_context}"
            )
        self.blueprint = blueprint
        self._weights = (params, biases)
        self._num_ids = config.vocab_size if num_ids is None else num_ids
        self._dtype = jnp.dtype(config.compute_dtype)
        self._share = blueprint.shape.data * blueprint.shape.expert
        caches: Any = cache_specs(config)
        weights = (specs_of(blueprint.params), blueprint.bias_specs)
        mapped = {
            "mesh": blueprint.mesh,
            "in_specs": (weights, caches, P(TOKEN_AXES, None), _ROWS, _ROWS, P()),
            "out_specs": (_ROWS, P(), caches),
            "check_vma": False,
        }
        step = jax.shard_map(self._step, **mapped)

        def prefill(weights: Any, tokens_BS: Any, *rest: Any, max_len: int) -> Any:
            mesh = blueprint.mesh
            cache = init_cache(config, tokens_BS.shape[0], max_len, self._dtype, mesh)
            return step(weights, cache, tokens_BS, *rest)

        def decode(weights: Any, cache: KVCache, tokens_B: Any, *rest: Any) -> Any:
            return step(weights, cache, tokens_B[:, None], *rest)

        self._prefill = jax.jit(prefill, static_argnames="max_len")
        self._decode = jax.jit(decode, donate_argnums=1)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        sampling: SamplingConfig,
        max_tokens: int,
        end_id: int | None = None,
        requests: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> list[Generated]:
        """Continues prompts of any lengths together.

        Args:
            prompts: token ids int32 [n], at least one each.
            sampling: how tokens are drawn.
            max_tokens: most tokens of a continuation.
            end_id: the id that ends a text; None: none does.
            requests: a number for each prompt, of which its random numbers depend; None counts.
            on_token: called with (index of the prompt, id) for each token as it comes, but for
                the end's; True stops that prompt.

        Returns:
            A continuation for each prompt.

        Raises:
            UserError: there is no prompt, one is empty or does not fit the context, or
                `max_tokens` is less than 1.
        """
        self._check(prompts, max_tokens)
        lengths = [len(prompt) for prompt in prompts]
        limits = [min(max_tokens, self.max_len - n) for n in lengths]
        rows_of, rows = self._layout(len(prompts))
        tokens_BS = np.zeros((rows, bucket(max(lengths), _SMALLEST_PROMPT, self.max_len)), np.int32)
        counts_B, requests_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for i, row in enumerate(rows_of):
            tokens_BS[row, : lengths[i]] = prompts[i]
            counts_B[row] = lengths[i]
            requests_B[row] = i if requests is None else requests[i]
        longest = max(n + limit for n, limit in zip(lengths, limits))
        settings = sampling.arrays()

        made: list[list[int]] = [[] for _ in prompts]
        reasons: dict[int, Any] = {}
        next_B, shown, cache = self._prefill(
            self._weights,
            tokens_BS,
            counts_B,
            requests_B,
            settings,
            max_len=bucket(longest, _SMALLEST_CACHE, self.max_len),
        )
        while True:
            for i, token in enumerate(np.asarray(shown)[rows_of].tolist()):
                if i in reasons:
                    continue
                if token == end_id:
                    reasons[i] = "end"
                    continue
                made[i].append(token)
                if on_token is not None and on_token(i, token):
                    reasons[i] = "stopped"
                elif len(made[i]) == limits[i]:
                    reasons[i] = "max_tokens" if limits[i] == max_tokens else "context"
            if len(reasons) == len(prompts):
                break
            counts_B = np.zeros(rows, np.int32)
            counts_B[[row for i, row in enumerate(rows_of) if i not in reasons]] = 1
            next_B, shown, cache = self._decode(
                self._weights, cache, next_B, counts_B, requests_B, settings
            )
        return [Generated(np.array(m, np.int32), reasons[i]) for i, m in enumerate(made)]

    def _check(self, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: must be at least 1")
        if not prompts or min(map(len, prompts)) == 0:
            raise UserError("no prompt, or one without tokens: give at least one token each")
        longest = max(map(len, prompts))
        if longest >= self.max_len:
            raise UserError(
                f"a prompt of {longest} tokens: prompt and continuation share a context of "
                f"{self.max_len} tokens; give at most {self.max_len - 1}"
            )

    def _layout(self, requests: int) -> tuple[np.ndarray, int]:
        """The row of each request, dealt over the devices, and the number of rows."""
        per_device = 1 << (-(-requests // self._share) - 1).bit_length()
        index = np.arange(requests)
        return index % self._share * per_device + index // self._share, per_device * self._share

    def _step(
        self,
        weights: tuple[Any, Any],
        cache: KVCache,
        tokens_BS: jax.Array,
        counts_B: jax.Array,
        requests_B: jax.Array,
        settings: SamplingArrays,
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """Appends the first `counts_B` tokens of each row and draws the next; inside the shard_map.

        Returns:
            the drawn tokens int32 [B] of this device, those of all devices, and the cache.
        """
        model = self.blueprint.merge(*weights)
        mask_BS = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32) < counts_B[:, None]
        out = model(tokens_BS, token_mask_BS=mask_BS, cache=cache, inference=True)
        assert out.cache is not None
        last_B = jnp.maximum(counts_B - 1, 0)
        hidden_BD = jnp.take_along_axis(out.hidden_BSD, last_B[:, None, None], axis=1)[:, 0]
        logits_BV = all_gather(model.logits(hidden_BD), TENSOR, 1)
        ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
        logits_BV = jnp.where(ids_V < self._num_ids, logits_BV, jnp.float32(PADDING_LOGIT))
        token_B = sample(logits_BV, requests_B, out.cache.lengths_B, settings)
        return token_B, all_gather(token_B, TOKEN_AXES), out.cache
