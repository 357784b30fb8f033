"""One process of test_tensor_parallel: answers on some number of CPU devices, and what the programs
are made of. Arguments: the number, and the folder with the models, where the results go too.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

NUM_DEVICES, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

from quire import LLM, RequestOutput  # noqa: E402  after the devices
from quire.engine.errors import ConfigError  # noqa: E402
from quire.engine.runner import Runner  # noqa: E402

from .engines import REFERENCE  # noqa: E402
from .hostile import make_hostile  # noqa: E402
from .parallel_models import CONFIGS, NUM_LOGPROBS, cases  # noqa: E402


def main() -> None:
    told: dict[str, Any] = {}
    for name in CONFIGS:
        num_logprobs = NUM_LOGPROBS if NUM_DEVICES > 1 and name == "qwen2" else -1
        with start(name, max_logprobs=num_logprobs) as llm:
            core = llm._engine.core
            told[name] = facts(core.runner) | {"plan": vars(llm._engine.plan)}
            if NUM_DEVICES > 1:
                make_hostile(llm)
            asked = cases(num_logprobs=num_logprobs)
            outputs = llm.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
            told[name]["num_steps"] = core.metrics.num_steps
        np.savez(FOLDER / f"{name}-{NUM_DEVICES}.npz", **arrays(outputs))
    if NUM_DEVICES == 4:
        with start("llama", decode_steps=4) as llm:
            asked = cases(num_logprobs=None)
            outputs = llm.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
            told["num_loop_steps"] = llm._engine.core.metrics.num_steps
        told["loop_tokens"] = [o.outputs[0].token_ids for o in outputs]
    if NUM_DEVICES == 8:
        try:
            LLM(str(REFERENCE / "llama2_mha"), tensor_parallel_size=NUM_DEVICES)
        except ConfigError as error:
            told["refusal"] = str(error)
    (FOLDER / f"{NUM_DEVICES}.json").write_text(json.dumps(told))


def start(name: str, **options: Any) -> LLM:
    return LLM(
        str(FOLDER / name), tokenizer=str(REFERENCE / "llama2_mha"), dtype="float32",
        tensor_parallel_size=NUM_DEVICES, max_num_seqs=8, max_num_batched_tokens=32,
        token_buckets=(32,), kv_cache_memory_bytes=1 << 20, max_model_len=128, **options,
    )  # fmt: skip


def arrays(outputs: list[RequestOutput]) -> dict[str, Any]:
    """tokens, and of each the logprob, rank, and the ids and logprobs of the most likely ones."""
    answers = [o.outputs[0] for o in outputs]
    made: dict[str, Any] = {"tokens": [a.token_ids for a in answers]}
    positions = [p for a in answers for p in a.logprobs or ()]
    scored = [p for o in outputs for p in (o.prompt_logprobs or ()) if p is not None]
    # The chosen token is told as well where it is not among those.
    width = min(len(row) for row in positions)
    for prefix, rows in (("", positions), ("prompt_", scored)):
        ranked = [sorted(row.items(), key=lambda item: item[1].rank or 0)[:width] for row in rows]
        made[f"{prefix}ids"] = [[token for token, _ in row] for row in ranked]
        made[f"{prefix}logprobs"] = [[p.logprob for _, p in row] for row in ranked]
    return made


def facts(runner: Runner) -> dict[str, Any]:
    """Counts of what the compiled programs hold."""
    forward = runner._executables["forward[32]"]
    memory = forward.memory_analysis()
    gathered = {
        name: sizes(program.as_text(), "all-gather")
        for name, program in runner._executables.items()
        if name.startswith("sample")
    }
    return {
        "all_reduces": len(sizes(forward.as_text(), "all-reduce")),
        "other_collectives": sum(
            len(sizes(forward.as_text(), kind))
            for kind in ("all-gather", "all-to-all", "reduce-scatter", "collective-permute")
        ),
        "gathered": gathered,
        "alias_bytes": memory.alias_size_in_bytes,
        "kv_bytes": sum(shard_bytes(a) for a in jax.tree.leaves(runner._kv)),
        "weight_bytes": sum(shard_bytes(a) for a in jax.tree.leaves(runner._weights)),
        "row_bytes": sum(shard_bytes(a) for a in jax.tree.leaves(runner._rows)),
    }


def shard_bytes(array: jax.Array) -> int:
    return array.addressable_shards[0].data.nbytes


def sizes(hlo: str, kind: str) -> list[int]:
    """Numbers in the result of each instruction of a kind."""
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* {kind}(?:-start)?\(", hlo)
    return [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in found]


if __name__ == "__main__":
    main()
