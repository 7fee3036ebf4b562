"""Measures PyTorch's grouped_mm in the same layer; started by `expert_layer.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from layer_shapes import Inputs, Shape
from layer_timing import Reporter, Timing, check, measure, parse_worker, work

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
NAMES = ("x", "router", "w_in", "w_out")


class Permute(torch.autograd.Function):
    """rows[index] for a permutation; its gradient is a gather by the inverse, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor):
        """Gathers."""
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, ct: torch.Tensor):
        """Gathers back."""
        (inverse,) = ctx.saved_tensors
        return ct[inverse], None, None


def layer(x_TD, router_DE, bias_E, w_in_EFD, w_out_EDH, top_k: int) -> torch.Tensor:
    """Router in float32, sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""
    tokens, d_model = x_TD.shape
    logits_TE = x_TD.float() @ router_DE
    if bias_E is not None:
        logits_TE = logits_TE + bias_E
    best_TK, ids_TK = torch.topk(logits_TE, top_k, dim=-1)
    scores_TK = torch.softmax(best_TK, dim=-1)

    sorted_A, order_A = torch.sort(ids_TK.reshape(-1), stable=True)
    place_A = torch.empty_like(order_A).scatter_(
        0, order_A, torch.arange(order_A.numel(), device=order_A.device)
    )
    experts = torch.arange(router_DE.shape[1], device=x_TD.device)
    ends_E = torch.searchsorted(sorted_A, experts, right=True).to(torch.int32)

    copies_AD = x_TD[:, None].expand(tokens, top_k, d_model).reshape(-1, d_model)
    rows_AD = Permute.apply(copies_AD, order_A, place_A)
    h_AF = grouped_mm(rows_AD, w_in_EFD.transpose(-2, -1), offs=ends_E)
    gate_AH, up_AH = h_AF.float().chunk(2, dim=-1)
    a_AH = (F.silu(gate_AH) * up_AH).to(x_TD.dtype)
    y_AD = grouped_mm(a_AH, w_out_EDH.transpose(-2, -1), offs=ends_E)
    y_TKD = Permute.apply(y_AD, place_A, order_A).view(tokens, top_k, d_model)
    return (y_TKD.float() * scores_TK[..., None]).sum(1).to(x_TD.dtype)


def loss_of(ct_TD, *arguments) -> torch.Tensor:
    """Σ y·ct in float32."""
    return (layer(*arguments).float() * ct_TD.float()).sum()


class Bench:
    """One shape on the GPU (on the CPU only to rehearse)."""

    def __init__(self, shape: Shape, inputs: Inputs, groups: int) -> None:
        self.shape, self.groups = shape, groups
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.x, self.ct = (self._put(a).bfloat16() for a in (inputs.x_TD, inputs.ct_TD))
        self.router = self._put(inputs.router_DE)
        self.bias = None if inputs.bias_E is None else self._put(inputs.bias_E)
        generator = torch.Generator(self.device).manual_seed(1)

        def normal(*size: int) -> torch.Tensor:
            # In one matrix of an expert at a time: the float32 draw is large.
            one = [
                (
                    torch.randn(size[1:], generator=generator, device=self.device)
                    * size[-1] ** -0.5
                ).bfloat16()
                for _ in range(size[0])
            ]
            return torch.stack(one)

        self.w_in = normal(shape.experts, 2 * shape.hidden, shape.d_model)
        self.w_out = normal(shape.experts, shape.d_model, shape.hidden)
        self.sample = self._put(inputs.sample)
        self.grads: dict[str, torch.Tensor] = {}
        self.arguments = (self.x, self.router, self.bias, self.w_in, self.w_out, shape.top_k)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def wait(self, _: Any) -> None:
        """Waits for all work issued to the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reference(self, backward: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list]:
        """The sample in float32, every expert on every token: y, gradients of x and the router.

        Also, for each expert, a function to its weights' gradients, so that they need not all be
        kept in float32.
        """
        x = self.x[self.sample].float().requires_grad_()
        router = self.router.detach().clone().requires_grad_()
        logits = x @ router + (0.0 if self.bias is None else self.bias)
        kth = logits.detach().sort(dim=1).values[:, -self.shape.top_k][:, None]
        scores = torch.softmax(logits.masked_fill(logits.detach() < kth, -torch.inf), dim=-1)
        ct = self.ct[self.sample].float()
        y = torch.zeros_like(x.detach())
        leaf_x, leaf_s = (a.detach().clone().requires_grad_() for a in (x, scores))
        sums = torch.zeros(2, 2, device=self.device)
        for e in range(self.shape.experts):
            w = [m[e].detach().float().requires_grad_(backward) for m in (self.w_in, self.w_out)]
            gate, up = (leaf_x @ w[0].T).chunk(2, dim=-1)
            out = leaf_s[:, e : e + 1] * ((F.silu(gate) * up) @ w[1].T)
            y += out.detach()
            if backward:
                (out * ct).sum().backward()
                for i, name in enumerate(("w_in", "w_out")):
                    got = self.grads[name][e].float()
                    sums[i, 0] += (got - w[i].grad).square().sum()
                    sums[i, 1] += w[i].grad.square().sum()
        if backward:
            scores.backward(leaf_s.grad)
            grads = {"x": x.grad + leaf_x.grad, "router": router.grad}
            return y, grads, sums.tolist()
        return y, {}, []

    def forward(self, compiled: Callable) -> tuple[Timing, dict[str, Any]]:
        """Checks, then times y; for decode the faster of calls and of a CUDA graph's replays."""
        with torch.no_grad():
            y = compiled(*self.arguments)
            want = self.reference(False)[0]
            got = y[self.sample].float()
            error = ((got - want).norm() / want.norm()).item()
            more: dict[str, Any] = {"error_vs_float32": check(error, "y")}
            called = measure(lambda: compiled(*self.arguments), self.wait, self.groups)
            if not self.shape.decode or self.device.type != "cuda":
                return called, more
            more["ms_single_calls"] = round(called.ms, 5)
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    compiled(*self.arguments)
                replayed = measure(graph.replay, self.wait, self.groups)
            except RuntimeError as why:
                more["cuda_graph"] = f"refused: {' '.join(str(why).split())[:150]}"
                return called, more
            return min(called, replayed, key=lambda t: t.ms), more

    def backward(self, compiled: Callable) -> tuple[Timing, dict[str, Any]]:
        """Checks all gradients, then times y and them."""
        x, router, w_in, w_out = (
            t.detach().requires_grad_() for t in (self.x, self.router, self.w_in, self.w_out)
        )
        arguments = (x, router, self.bias, w_in, w_out, self.shape.top_k)

        def gradients(ct: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(compiled(ct, *arguments), (x, router, w_in, w_out))

        sparse = torch.zeros_like(self.ct)
        sparse[self.sample] = self.ct[self.sample]
        self.grads = dict(zip(NAMES, gradients(sparse)))
        _, wants, sums = self.reference(True)
        got_x = self.grads["x"].float()
        pairs = {"w_in": sums[0], "w_out": sums[1]}
        # What is not zero outside the sample counts as error.
        inside = (got_x[self.sample] - wants["x"]).square().sum()
        outside = got_x.square().sum() - got_x[self.sample].square().sum()
        pairs["x"] = [(inside + outside.abs()).item(), wants["x"].square().sum().item()]
        router_off = (self.grads["router"] - wants["router"]).square().sum().item()
        pairs["router"] = [router_off, wants["router"].square().sum().item()]
        self.grads = {}
        del got_x, wants
        found = {
            name: check((pair[0] / pair[1]) ** 0.5, f"gradient of {name}")
            for name, pair in sorted(pairs.items())
        }
        timing = measure(lambda: gradients(self.ct), self.wait, self.groups)
        return timing, {"gradient_errors_vs_float32": found}


def main() -> None:
    args = parse_worker()
    torch.set_float32_matmul_precision("highest")
    for todo, shape, inputs in work(args):
        usable = torch.cuda.is_available() or args.tiny
        bench = Bench(shape, inputs, args.repeats) if usable else None
        for impl, name, which in todo:
            backward = which == "fwdbwd"
            report = Reporter(impl, name, shape, inputs, args.routing)
            if bench is None:
                report.failed(backward, "torch sees no GPU")
                continue
            torch._dynamo.reset()
            try:
                compiled = torch.compile(loss_of if backward else layer, dynamic=False)
                timing, more = (bench.backward if backward else bench.forward)(compiled)
                report.row(backward, timing, **more, torch=torch.__version__)
            except Exception as why:
                report.failed(backward, why)
            bench.grads = {}
            gc.collect()
            bench.wait(None)  # a fault of a kernel stays with the process: a new one goes on
        del bench
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
