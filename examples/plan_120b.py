"""The documents' 120B configuration on 192 and on 72 GPUs: which mesh, how much memory, how long a step.

Run it anywhere: nothing is computed with the model. Its exact number of parameters is 206.6e9.
"""

from __future__ import annotations

import tessera as ts
from tessera.plan import InferenceRun, explain, gpt_120b, machine_named, search_inference, search_training


def show(title: str, search: ts.plan.Search) -> None:
    print(f"\n{title}")
    for line in explain(search):
        print(f"  {line}")


config = gpt_120b()
nvl72 = machine_named("nvl72")
print(f"{config.n_params:,} parameters")

show("192 GPUs of NVL72 racks, as the overview cuts it: 96 key/value heads, tp 8 x pp 6 x dp 4",
     search_training(gpt_120b(n_kv_heads=96), nvl72, 192, global_batch=256, tp=8, pp=6, dp=4))
show("The same 192 GPUs, free choice",
     search_training(gpt_120b(n_kv_heads=96), nvl72, 192, global_batch=256))
show("One NVL72 rack, as the training example cuts it: 8 key/value heads, tp 9 x pp 2 x dp 4",
     search_training(config, nvl72, 72, global_batch=256, tp=9, pp=2, dp=4))
show("One NVL72 rack, free choice",
     search_training(config, nvl72, 72, global_batch=256))
show("Generation on 8 of its GPUs, FP8 weights and cache, 32 requests",
     search_inference(config, nvl72, 8, InferenceRun(batch=32, prompt=2048, new_tokens=512)))

axes, shape = ts.plan.choose_mesh(config)
print(f"\ndist.mesh(devices, axes={axes}, shape={shape})")
