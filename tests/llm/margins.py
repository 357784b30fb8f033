"""How close a decision was to another one: what may come out otherwise with other rounding."""

import jax
import numpy as np
from quire import SamplingParams


def margin(logits: np.ndarray, output: list[int], token: int, p: SamplingParams) -> float:
    """Distance of a decision from another one: between the two best logits, or between the uniform
    and the nearer end of the token's interval of the distribution that is drawn from.

    logits: up to a constant; output: the tokens before this one.
    """
    x = logits.astype(np.float64).copy()
    if p.repetition_penalty != 1:
        # Logprobs are logits up to a constant, which the penalty is not blind to. Without a margin
        # these steps may differ only within the 5 % that need not be compared.
        return 0.0
    for biased, value in (p.logit_bias or {}).items():
        x[biased] += value
    counts = np.bincount(np.array(output, int), minlength=len(x))
    x -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    if p.allowed_token_ids is not None:
        x[~np.isin(np.arange(len(x)), p.allowed_token_ids)] = -np.inf
    if p.temperature == 0:
        best = np.sort(x)[::-1]
        return float(best[0] - best[1])
    x = x / p.temperature
    x[x < x.max() + np.log(p.min_p or 1e-300)] = -np.inf
    if p.top_k:
        x[x < np.sort(x)[-p.top_k]] = -np.inf
    weights = np.exp(x - x.max())
    if p.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= p.top_p * weights.sum()]] = 0
    ends = np.cumsum(weights) / weights.sum()
    key = jax.random.fold_in(jax.random.wrap_key_data(np.array([0, p.seed], np.uint32)), 0)
    uniform = float(jax.random.uniform(jax.random.fold_in(key, len(output))))
    start = ends[token] - weights[token] / weights.sum()
    assert start - 1e-4 <= uniform <= ends[token] + 1e-4, "the oracle draws another token"
    return min(abs(uniform - start), abs(ends[token] - uniform))
