"""What happens around the steps of a run: batches, the log, evaluations, checkpoints, the end."""

from __future__ import annotations

import dataclasses
import math
import resource
import shlex
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.data.corpus import reference_compression
from moejax.errors import UserError
from moejax.inference.source import open_model
from moejax.moe_aux import MoEAux
from moejax.placement.counting import make_counters, read_counters
from moejax.placement.statistics import write_statistics
from moejax.routing.metrics import router_metrics
from moejax.training.anomaly import NONE, NONFINITE, Verdict, history_to_json, make_history
from moejax.training.anomaly_log import AnomalyLog
from moejax.training.checkpoint import Checkpoints
from moejax.training.config import TrainConfig
from moejax.training.config_json import config_to_json
from moejax.training.evaluate import Evaluator
from moejax.training.init_from import initial_state
from moejax.training.origin import keep_origin
from moejax.training.pictures import draw_expert_load, draw_loss
from moejax.training.placing import Placing
from moejax.training.report import StepTimer, format_duration, print_summary, step_line
from moejax.training.residuals import (
    PREFIX,
    continuation_notes,
    residual_arrays,
    residual_metadata,
    residual_targets,
    with_residuals,
)
from moejax.training.rundir import RunDir
from moejax.training.state import (
    Blueprint,
    TrainState,
    from_logical,
    init_state,
    logical_targets,
    to_logical,
)
from moejax.training.step import BATCH_SPEC
from moejax.training.text import Text
from sharding.distributed import say
from sharding.flops import peak_flops, step_flops_per_token

__all__ = ["Session"]

SAMPLE_TOKENS = 200
LOAD_SNAPSHOTS = 50  # times the experts' tokens are written into metrics.jsonl


class Session:
    """One process's part of a run."""

    def __init__(
        self,
        run: RunDir,
        checkpoints: Checkpoints,
        blueprint: Blueprint,
        config: TrainConfig,
        text: Text,
    ):
        self._run, self._checkpoints = run, checkpoints
        self._blueprint, self._config, self._text = blueprint, config, text
        self.placing = Placing(run, blueprint, config)
        self._anomalies = AnomalyLog(run, config, text)
        self._held_out: dict[int, float] = {}
        self._compiled = False
        device = blueprint.mesh.devices.flat[0]
        self._peak = peak_flops(device.device_kind, config.model.compute_dtype)
        self._flops = step_flops_per_token(config.model, config.data.seq_len)

    def batch(self, step: int) -> jax.Array:
        """The examples of a step on their devices; int32 [accumulate, examples, S + 1].

        Each process makes those of its own devices.
        """
        data, parts = self._config.data, self._config.accumulate
        shape = (parts, data.batch_size // parts, data.seq_len + 1)
        sharding = NamedSharding(self._blueprint.mesh, BATCH_SPEC)
        made: dict[tuple[int, int], np.ndarray] = {}  # devices along `tensor` have the same ones

        def examples(index: Any) -> np.ndarray:
            mine = slice(*index[1].indices(shape[1]))
            key = mine.start, mine.stop
            if key not in made:
                made[key] = np.stack(
                    [
                        self._text.dataset.batch(
                            step,
                            data.batch_size,
                            slice(part * shape[1] + mine.start, part * shape[1] + mine.stop),
                        )
                        for part in range(parts)
                    ]
                )
            return made[key]

        return jax.make_array_from_callback(shape, sharding, examples)

    @property
    def stopped(self) -> str | None:
        """Why no further step is taken; None while they are. See `AnomalyConfig`."""
        return self._anomalies.stopped

    def restore(self) -> TrainState | None:
        """The state of the newest checkpoint that is whole; None without one."""
        blueprint, config = self._blueprint, self._config
        seen: dict[str, Any] = {}

        def targets(content: Any) -> dict[str, Any]:
            seen.update(content)  # of the last one that is tried, which is restored
            return logical_targets(blueprint) | residual_targets(blueprint, config, content)

        found = self._checkpoints.restore_latest(targets, partial=PREFIX)
        if found is None:
            return None
        step, flat, metadata = found
        if metadata["tokenizer"] != self._text.record["tokenizer"]:
            raise UserError(
                f"{self._run.path}: the run was trained with another tokenizer; pass the same "
                "tokenizer flags or choose a new run directory"
            )
        hashes = ("corpus_sha256", "held_out_sha256")
        if any(metadata["text"].get(h) != self._text.record[h] for h in hashes):
            say("note: the text has changed since this run was started")
        say(f"resuming after step {step}")
        for note in continuation_notes(blueprint, config, seen, step):
            say(note)
        state = jax.block_until_ready(from_logical(flat, blueprint))
        state = self._with_history(state, metadata.get("anomaly"))
        return with_residuals(state, blueprint, config, flat, metadata)

    def begin(self) -> TrainState:
        """The state of step 0: random, or a model's weights."""
        if not self._config.init_from:
            state = jax.block_until_ready(init_state(self._blueprint, self._config.seed))
            return with_residuals(self._with_history(state), self._blueprint, self._config)
        source = open_model(self._config.init_from)
        state = jax.block_until_ready(initial_state(self._blueprint, source, say))
        if self._run.writable:
            keep_origin(self._run.path, source)
        say(f"begins with the weights of {source.path}")
        return with_residuals(self._with_history(state), self._blueprint, self._config)

    def _with_history(self, state: TrainState, kept: dict[str, Any] | None = None) -> TrainState:
        """The state with the history of a checkpoint, by which steps are judged."""
        if not self._config.anomaly.active:
            return state
        history = make_history(self._config.anomaly, self._blueprint.mesh, kept)
        return dataclasses.replace(state, history=history)

    def save(self, state: TrainState) -> None:
        """Starts writing a checkpoint."""
        metadata = {
            "model": config_to_json(self._config.model),
            "tokenizer": self._text.record["tokenizer"],
            "text": self._text.record,
            "seed": self._config.seed,
            "residuals": residual_metadata(self._blueprint, self._config),
            "anomaly": None if state.history is None else history_to_json(state.history),
        }
        flat = jax.block_until_ready(to_logical(state)) | residual_arrays(state)
        self._checkpoints.save(int(state.step), flat, metadata)

    def start_counting(self, state: TrainState) -> TrainState:
        """The state with empty counters of the experts that are chosen together, if it is asked."""
        if not self._config.placement_stats and self._config.placement == "home":
            return state
        config = self._blueprint.config
        layers = sum(layer.moe is not None for layer in config.layers())
        counts = make_counters(self._blueprint.mesh, layers, config.moe.router.num_experts)
        return dataclasses.replace(state, counts=jax.block_until_ready(counts))

    def write_placement_stats(self, state: TrainState) -> None:
        """Writes what was counted, if anything was; a run that is over keeps what it has."""
        if state.counts is None or not self._config.placement_stats:
            return
        statistics = read_counters(state.counts, self._blueprint.mesh)  # by all processes
        if self._run.writable and statistics.tokens_L.any():
            write_statistics(self._run.placement_stats_path, statistics)

    def log(self, step: int, metrics: dict[str, Any], timer: StepTimer) -> None:
        """Waits for a step's metrics, writes its line of metrics.jsonl and prints it.

        Of steps after one that has stopped the run, which did nothing, nothing is written.
        """
        if self.stopped is not None:
            return
        metrics = jax.device_get(metrics)
        timer.tick(compiled=not self._compiled)
        self._compiled = True
        loss = float(metrics["loss"])
        bits = loss / math.log(2) / self._text.bytes_per_token
        rate = timer.tokens_per_second
        mfu = None
        if self._peak:
            mfu = rate * self._flops / (self._peak * self._blueprint.shape.size)
        row = {
            "step": step,
            "loss": loss,
            "bits_per_byte": bits,
            "aux_loss": metrics["aux_loss"],
            "learning_rate": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            "step_seconds": timer.step_seconds,
            "tokens_per_second": rate,
            "model_flops_utilisation": mfu,
            "memory_bytes": _memory_bytes(self._blueprint.mesh),
            **self._moe_metrics(step, metrics["moe"]),
            **self.placing.metrics,
            **_anomaly_metrics(metrics["anomaly"]),
        }
        self._run.append_metrics(row)
        line = step_line(
            step,
            self._config.steps,
            loss=loss,
            bits_per_byte=bits,
            learning_rate=float(metrics["learning_rate"]),
            grad_norm=float(metrics["grad_norm"]),
            step_seconds=timer.step_seconds,
            tokens_per_second=rate,
            seconds_left=timer.seconds_left,
            utilisation=mfu,
        )
        say(line)
        self._anomalies.note(step, metrics)

    def _moe_metrics(self, step: int, moe: MoEAux | None) -> dict[str, Any]:
        if moe is None:
            return {}
        experts = np.array(self._config.model.expert_numbers)
        router = router_metrics(moe.counts_E, moe.entropy_sum, moe.num_tokens, moe.kept, experts)
        row: dict[str, Any] = {
            "router_entropy": router["entropy"],
            "load_max_over_mean": router["max_over_mean"],
            "exchange": {name: value for name, value in vars(moe.counters).items()},
        }
        if "score_mass_kept" in router:
            row["score_mass_kept"] = router["score_mass_kept"]
        every = max(1, self._config.steps // LOAD_SNAPSHOTS)
        if step % every == 0 or step == 1:
            row["tokens_per_expert"] = router["tokens_per_expert"]
        return row

    def evaluate(self, step: int, state: TrainState, evaluator: Evaluator) -> None:
        """Writes an estimate of held-out bits per byte on the way."""
        params = evaluator.weights(state)
        limit, where = self._config.eval_windows, self.placing.arrays
        bits = evaluator.bits_per_byte(params, state.biases, limit, where)
        self._note_held_out(step, bits, evaluator.score_mass_kept)
        say(f"step {step}: held-out {bits:.3f} bits/byte (estimate)")

    def _note_held_out(self, step: int, bits: float, mass: float | None) -> None:
        self._held_out[step] = bits
        row = {"step": step, "heldout_bits_per_byte": bits}
        if mass is not None:
            row["score_mass_kept"] = mass
        self._run.append_evaluation(row)

    def sample(self, params: Any, biases: Any, prompt: str) -> str:
        """The prompt and its continuation, drawn at temperature 0.8."""
        from moejax.inference.generate import Generator
        from moejax.inference.sampling import SamplingConfig
        from moejax.inference.text import complete

        tokenizer = self._text.tokenizer
        room = min(self._config.model.max_context, SAMPLE_TOKENS + len(tokenizer.encode(prompt)))
        generator = Generator(self._blueprint, params, biases, room, tokenizer.vocab_size)
        sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=self._config.seed)
        (continuation,) = complete(
            generator, tokenizer, [prompt], sampling=sampling, max_tokens=SAMPLE_TOKENS
        )
        return prompt + continuation.text

    def finish(
        self, state: TrainState, evaluator: Evaluator, timer: StepTimer, stopped: bool
    ) -> None:
        """Draws the pictures and, unless stopped early, evaluates everything and sums up."""
        step = int(state.step)
        self.placing.finish()
        if stopped:
            self._draw({})
            return
        say("evaluating on all held-out text")
        params = evaluator.weights(state)
        bits = evaluator.bits_per_byte(params, state.biases, placement=self.placing.arrays)
        self._note_held_out(step, bits, evaluator.score_mass_kept)
        sample = self.sample(params, state.biases, "def ")
        if not self._run.writable:
            return  # the rest is of the process that writes
        references = reference_compression(self._text.held_out)
        self._draw(references)
        self._run.append_sample(f"--- step {step}, {bits:.3f} bits/byte ---\n{sample}\n")
        self._run.write_summary(
            {
                "steps": step,
                "bits_per_byte": bits,
                **references,
                "training_seconds": timer.training_seconds,
                "program_seconds": timer.program_seconds,
                "paused_seconds": timer.paused_seconds,
                "tokens_per_second": self._rate(timer),
                "text": self._text.record,
            }
        )
        print(f"\nsample:\n{sample}\n")
        rows = [
            ("held-out", f"{bits:.3f} bits/byte"),
            ("zlib -9", f"{references['zlib']:.3f} bits/byte on the same files"),
            ("xz -9e", f"{references['xz']:.3f} bits/byte on the same files"),
            ("time", f"{format_duration(timer.training_seconds)} in {step} steps"),
            ("run directory", str(self._run.path)),
        ]
        print_summary("Training has ended", rows)
        # Outside the table, which breaks long lines: this one is to be copied.
        command = f'python infer.py --model {shlex.quote(str(self._run.path))} -p "def "'
        print(f"talk to it: {command}", flush=True)

    def _rate(self, timer: StepTimer) -> float | None:
        """Tokens a second; None when this process made no step."""
        rate = timer.tokens_per_second
        return rate if math.isfinite(rate) else None

    def _draw(self, references: dict[str, float]) -> None:
        rows = self._run.metrics() if self._run.writable else []
        if not rows:
            return
        draw_loss(
            [*rows, *self._run.evaluations()],
            self._run.loss_picture,
            references.get("zlib"),
            references.get("xz"),
        )
        loads = [r for r in rows if r.get("tokens_per_expert")]
        if loads:
            history = np.array([r["tokens_per_expert"] for r in loads])
            steps = [r["step"] for r in loads]
            experts = self._config.model.expert_numbers
            draw_expert_load(history, self._run.expert_load_picture, steps, experts)


def _anomaly_metrics(verdict: Verdict | None) -> dict[str, Any]:
    """Of a step that was unusual: what it was, and whether it was applied."""
    if verdict is None or int(verdict.kind) == NONE:
        return {}
    kind = "nonfinite" if int(verdict.kind) == NONFINITE else "spike"
    return {"anomaly": kind, "applied": bool(verdict.apply)}


def _memory_bytes(mesh: Any) -> int:
    """Peak bytes of a device, or of the process where devices do not tell (CPU)."""
    stats = mesh.local_devices[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
