"""The MoE layer in a Flax model of your own: 16 experts over 4 devices, trained with optax."""

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp

from moejax import ExpertsConfig, MoEConfig, RouterConfig, ShardedMoELayer
from sharding import MeshShape, make_mesh

jax.config.update("jax_num_cpu_devices", 8)  # fake devices; no effect on a GPU
MOE = MoEConfig(RouterConfig(num_experts=16, top_k=4), ExpertsConfig(hidden=32))


class Regressor(nnx.Module):
    """Any Flax modules around the layer; only the layer knows of the mesh."""

    def __init__(self, mesh, rngs):
        self.first = nnx.Linear(8, 64, rngs=rngs)
        self.moe = ShardedMoELayer(64, MOE, mesh=mesh, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.first(x))
        y, aux_loss, report = self.moe(h)  # h: [..., 64], any number of rows, sharded in any way
        return self.last(h + y), aux_loss, report


def loss_of(model, x, target):
    y, aux_loss, report = model(x)
    return jnp.mean((y - target) ** 2) + aux_loss, report  # aux_loss evens the experts' loads


@nnx.jit
def train_step(model, optimizer, x, target):
    (loss, report), grads = nnx.value_and_grad(loss_of, has_aux=True)(model, x, target)
    optimizer.update(model, grads)
    return loss, report


model = Regressor(make_mesh(MeshShape(data=2, expert=4)), nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
x = jax.random.normal(jax.random.key(1), (200, 8))
target = jnp.sin(x.sum(-1, keepdims=True))
losses = []
for _ in range(60):
    loss, report = train_step(model, optimizer, x, target)
    losses.append(float(loss))

# Each device holds its experts only. The same weights on one device give the same numbers.
held = model.moe.layer.bank.w_in[...].addressable_shards[0].data.shape[0]
alone = Regressor(make_mesh(MeshShape()), nnx.Rngs(1))
nnx.update(alone, jax.tree.map(np.asarray, nnx.state(model)))
call = nnx.jit(lambda model, x: model(x)[0])
apart = np.abs(np.asarray(call(model, x)) - np.asarray(call(alone, x))).max()
moved = report.counters
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")
print(f"a device holds {held} of 16 experts; another mesh changes outputs by at most {apart:.0e}")
print(
    f"200 tokens chose {moved.assignments} experts: "
    f"{moved.rows_self} rows stayed at home, {moved.rows_host} went to another device"
)
assert held == 4 and losses[-1] < losses[0] / 3 and apart < 1e-5
assert moved.assignments == 200 * 4
