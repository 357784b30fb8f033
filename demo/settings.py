"""The settings of a training run."""

from dataclasses import dataclass, field
from functools import partial

from .model import ModelShape
from .tokenizer import VOCAB_SIZE


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the outcome; a checkpoint of other settings is not resumed."""

    shape: ModelShape = field(default_factory=partial(ModelShape, vocab_size=VOCAB_SIZE))
    seed: int = 0
    num_steps: int = 8000
    num_rows: int = 6
    row_tokens: int = 320
    num_warmup_steps: int = 50
    # The rate falls as if to end after so many steps, then from turn_step on more slowly.
    first_end_step: int = 6000
    turn_step: int = 4050
    matrix_rate: float = 6e-3
    vector_rate: float = 3e-3
    weight_decay: float = 0.05
