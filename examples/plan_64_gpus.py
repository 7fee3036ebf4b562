"""Plans Qwen3-30B-A3B on 64 H100 in 8 hosts: which mesh, then which experts live together.

Nothing is allocated and no GPU is needed. The mesh is also what `train.py --preset qwen3-30b-a3b
--dry-run --plan-for h100 --plan-devices 64` tells; the placement `python -m moejax.placement`.
"""

import numpy as np

from moejax.placement.arrays import slots_at_home
from moejax.placement.evaluate import mean_of, measure_trace
from moejax.placement.generator import generate, make_traffic
from moejax.placement.planner import plan
from moejax.placement.statistics import statistics_of
from moejax.placement.topology import Topology
from moejax.presets import qwen3_30b_a3b
from sharding.device_kinds import hardware_of
from sharding.recommend import recommend
from sharding.recommend_text import format_recommendation

# The time of a step from closed formulas for every layout; the fastest are traced for their memory.
config, hardware = qwen3_30b_a3b(), hardware_of("h100", host_devices=8)
found = recommend(config, hardware, 64, most=2)
command = ["train.py", "--preset", "qwen3-30b-a3b", "--data.paths", "TEXTS"]
print("\n".join(format_recommendation(found, command)))
best = found.best[0]
assert best.layout.mesh.size == 64 and best.plan.memory.total < found.limit

# Which experts serve the same tokens. Here made up; of your model `infer.py routes --trace FILE` or
# `train.py --placement-stats` counts it. A plan is measured on documents that it has not seen.
router = config.model.moe.router
traffic = make_traffic(router.num_experts, layers=2, choices=router.top_k, zipf=0.3)
seen, unseen = generate(traffic, tokens=30_000).split(0.5)
mesh = best.layout.mesh
hosts = max(1, mesh.expert * mesh.tensor // 8)
topology = Topology.even(router.num_experts, mesh.expert, hosts)
planned_LP = plan(statistics_of(seen), topology).slots_LP
home_LP = np.tile(slots_at_home(router.num_experts, mesh.expert), (len(planned_LP), 1))
print(f"\n{router.num_experts} experts on {mesh.expert} devices, {hosts} hosts")
print("  experts live    devices a token goes to    other hosts    largest load / mean")
sends = []
for name, slots_LP in {"in order": home_LP, "as planned": planned_LP}.items():
    mean = mean_of(measure_trace(unseen, slots_LP, topology))
    sends.append(mean.remote_hosts)
    row = f"{mean.remote_sends:>23.2f}{mean.remote_hosts:>15.2f}{mean.load_max_mean:>23.2f}"
    print(f"  {name:<14}{row}")
assert sends[1] < 0.9 * sends[0]
