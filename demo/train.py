"""Trains quire-demo and writes it to engine/assets/demo.

`python -m quire.demo.train` gives the same model on every run of one machine; killed
or out of --minutes, it goes on from its last checkpoint. Owns the loop, the optimizer and the
checkpoint; the corpus, the model and the export are their own files.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from optax.contrib import MuonDimensionNumbers, muon

from .batches import Batch, make_batch
from .export import ASSETS, save_model
from .model import ModelShape, Weights, forward, init_weights
from .settings import TrainingSettings
from .tokenizer import TEXT_END, TURN_END, save_tokenizer, train_tokenizer

CHECKPOINTS = Path(__file__).parent / "build"  # ignored by git
STEPS_PER_REPORT = 50


class TrainingState(NamedTuple):
    weights: Weights
    optimizer: optax.OptState
    num_steps: jax.Array  # i32[], how many are done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop then; run again to go on")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    args = parser.parse_args()
    settings = TrainingSettings(seed=args.seed)
    tokenizer = train_tokenizer(settings.seed)
    checkpoint = args.checkpoints / f"seed{args.seed}.npz"
    state = train(settings, tokenizer, checkpoint, max_s=args.minutes * 60)
    save_tokenizer(tokenizer, args.out, settings.shape.max_tokens)
    save_model(
        state.weights,
        settings.shape,
        args.out,
        bos_id=tokenizer.token_to_id(TEXT_END),
        eos_id=tokenizer.token_to_id(TURN_END),
    )
    print(f"wrote {args.out} after {int(state.num_steps)} of {settings.num_steps} steps")


def train(
    settings: TrainingSettings, tokenizer: tokenizers.Tokenizer, checkpoint: Path, max_s: float
) -> TrainingState:
    """The state after the last step, or after max_s seconds; the checkpoint holds the same."""
    optimizer = make_optimizer(settings)
    state = _first_state(settings, optimizer)
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, settings, state)
    advance = _make_advance(settings, optimizer)
    started_s = saved_s = time.monotonic()
    first_step, losses = int(state.num_steps), []
    for step in range(first_step, settings.num_steps):
        batch = make_batch(tokenizer, settings.seed, step, settings.num_rows, settings.row_tokens)
        state, loss = advance(state, batch)
        losses.append(loss)
        if (step + 1) % STEPS_PER_REPORT == 0:
            now_s = time.monotonic()
            step_s = (now_s - started_s) / (step + 1 - first_step)
            mean_loss = float(np.mean([float(x) for x in losses]))
            print(f"step {step + 1} loss {mean_loss:.4f} {step_s:.3f} s/step", flush=True)
            losses.clear()
            if now_s - started_s > max_s:
                break
            if now_s - saved_s > 60:
                save_checkpoint(checkpoint, settings, state)
                saved_s = now_s
    save_checkpoint(checkpoint, settings, state)
    return state


def make_optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the layers' matrices, Adam for the embedding and the norms; warmed
    up, then linearly down, in two slopes, to 0 at the last step (after Defazio et al. 2023).

    Muon's updates are scaled to Adam's size, 0.2 sqrt(max(out, in)) (Liu et al. 2025, eq. 4).
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            _schedule(settings.matrix_rate, settings),
            adam_learning_rate=_schedule(settings.vector_rate, settings),
            adam_b2=0.98,
            weight_decay=settings.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrix_axes,
        ),
    )


def answer_loss(weights: Weights, batch: Batch, shape: ModelShape) -> jax.Array:
    """Mean cross-entropy of the assistant's tokens: prompts are random and teach little."""
    logits = forward(weights, batch.token_ids, batch.segment_ids, shape)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.target_weights) / jnp.sum(batch.target_weights)


def save_checkpoint(file: Path, settings: TrainingSettings, state: TrainingState) -> None:
    """Written beside and then moved: a kill leaves the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        np.savez(stream, settings=json.dumps(asdict(settings)), **leaves)
    os.replace(unfinished, file)


def load_checkpoint(file: Path, settings: TrainingSettings, like: TrainingState) -> TrainingState:
    """like: a state of the same structure. Raises ValueError for a run of other settings."""
    with np.load(file) as saved:
        if str(saved["settings"]) != json.dumps(asdict(settings)):
            raise ValueError(
                f"{file} is of a run with other settings ({saved['settings']}); delete it, or give "
                "another --checkpoints folder"
            )
        leaves, structure = jax.tree.flatten(like)
        loaded = [jnp.asarray(saved[str(i)]) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, loaded)


def _first_state(
    settings: TrainingSettings, optimizer: optax.GradientTransformation
) -> TrainingState:
    weights = init_weights(settings.shape, jax.random.key(settings.seed))
    return TrainingState(weights, optimizer.init(weights), jnp.zeros((), jnp.int32))


def _schedule(peak: float, settings: TrainingSettings) -> optax.Schedule:
    num_warmup, turn = settings.num_warmup_steps, settings.turn_step
    rise = optax.linear_schedule(0.0, peak, num_warmup)
    fall = optax.linear_schedule(peak, 0.0, settings.first_end_step - num_warmup)
    at_turn = float(fall(turn - num_warmup))
    slow_fall = optax.linear_schedule(at_turn, 0.0, settings.num_steps - turn)
    return optax.join_schedules([rise, fall, slow_fall], [num_warmup, turn])


def _matrix_axes(weights: Weights) -> dict[str, MuonDimensionNumbers | None]:
    """Which axes are in and out; None for what Muon leaves to Adam."""
    in_then_out = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return {name: in_then_out if name.endswith("_proj.weight") else None for name in weights}


def _make_advance(
    settings: TrainingSettings, optimizer: optax.GradientTransformation
) -> Callable[[TrainingState, Batch], tuple[TrainingState, jax.Array]]:
    @partial(jax.jit, donate_argnums=0)
    def advance(state: TrainingState, arrays: dict[str, jax.Array]):
        batch = Batch(**arrays)
        loss, gradient = jax.value_and_grad(answer_loss)(state.weights, batch, settings.shape)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return TrainingState(weights, optimizer_state, state.num_steps + 1), loss

    return lambda state, batch: advance(state, vars(batch))


if __name__ == "__main__":
    main()
