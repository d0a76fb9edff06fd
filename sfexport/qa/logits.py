"""Change a model's logits before a token is chosen, as transformers' logits processors do. NumPy only.

All compute in the type of the scores, float32 as in transformers: at a threshold the last bit decides which tokens
stay.
`ids` are the answer's tokens so far: the prompt enters as embeddings, and processors do not see it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from sfexport.errors import InputError

TOP_H_TOKENS = 100  # top-h looks at this many of the likeliest tokens


def biases(sequences: Sequence[tuple[Sequence[int], float]], ids: Sequence[int], size: int) -> np.ndarray:
    """Return the bias of each token that would complete a sequence, float32 [size].

    Raises:
        InputError: a sequence has a token beyond the vocabulary.
    """
    out = np.zeros(size, dtype=np.float32)
    for sequence, bias in {tuple(sequence): bias for sequence, bias in sequences}.items():
        if max(sequence) >= size:
            raise InputError(
                f"A biased or forbidden sequence has the token {max(sequence)}, and the tokenizer has {size:,}.",
                "Correct sequence_bias or bad_words_ids in generation_config.json and export again.",
            )
        *prefix, last = sequence
        if not prefix or list(ids[-len(prefix) :]) == prefix:
            out[last] += np.float32(bias)
    return out


def penalise(scores: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """Divide the scores of tokens already drawn by `penalty`, or multiply negative ones."""
    if penalty == 1.0 or not ids:
        return scores
    scores, seen, penalty = scores.copy(), np.unique(ids), scores.dtype.type(penalty)
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def repeated(ids: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would repeat an n-gram of `size` tokens in `ids`."""
    if size == 0 or len(ids) < size:
        return []
    prefix = list(ids[len(ids) + 1 - size :])
    starts = range(len(ids) - size + 1)
    return [ids[i + size - 1] for i in starts if list(ids[i : i + size - 1]) == prefix]


def forbid(scores: np.ndarray, tokens: Collection[int]) -> np.ndarray:
    """Set the scores of the tokens to -inf; ignore tokens outside the vocabulary."""
    inside = [token for token in tokens if 0 <= token < len(scores)]
    if not inside:
        return scores
    scores = scores.copy()
    scores[inside] = -np.inf
    return scores


def force(scores: np.ndarray, tokens: Collection[int]) -> np.ndarray:
    """Return scores that allow these tokens only, all equally likely.

    Raises:
        InputError: a token is beyond the vocabulary.
    """
    if max(tokens) >= len(scores):
        raise InputError(
            f"The forced token {max(tokens)} does not exist: the tokenizer has {len(scores):,} tokens.",
            "Correct forced_bos_token_id or forced_eos_token_id in generation_config.json and export again.",
        )
    out = np.full_like(scores, -np.inf)
    out[list(tokens)] = 0
    return out


def replace_invalid(scores: np.ndarray) -> np.ndarray:
    """Replace NaN by 0 and infinities by the largest finite numbers."""
    limits = np.finfo(scores.dtype)
    out: np.ndarray = np.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min)
    return out


def decay(scores: np.ndarray, ends: Collection[int], step: int, start: int, factor: float) -> np.ndarray:
    """Make ending likelier by `factor` at each step after `start`."""
    inside = [token for token in ends if token < len(scores)]
    if step <= start or not inside:
        return scores
    scores = scores.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        growth = scores.dtype.type(np.float64(factor) ** (step - start) - 1)
        extra = np.abs(scores[inside]) * growth
    scores[inside] += np.where(np.isfinite(scores[inside]), extra, 0)
    return scores


# Filters when sampling: each sets the scores of excluded tokens to -inf, and always keeps the likeliest token.


def keep_top_h(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the likeliest of the top 100 tokens, up to `share` of the entropy of these 100."""
    order = np.argsort(-scores, kind="stable")[:TOP_H_TOKENS]
    logs = log_softmax(scores[order])
    chances = softmax(logs)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = -chances * np.log(chances)
    entropy = -np.sum(np.maximum(logs, np.finfo(logs.dtype).min) * chances, dtype=scores.dtype)
    kept = _running_sum(terms) <= entropy * scores.dtype.type(share)
    kept[0] = True
    return _keep(scores, order[kept])


def keep_top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` likeliest tokens, and those as likely as the last of them."""
    if count >= len(scores):
        return scores
    return np.where(scores < np.partition(scores, -count)[-count], -np.inf, scores).astype(scores.dtype)


def keep_top_p(scores: np.ndarray, mass: float) -> np.ndarray:
    """Keep the smallest set of the likeliest tokens whose mass reaches `mass`."""
    order = np.argsort(scores, kind="stable")
    kept = _running_sum(softmax(scores[order])) > scores.dtype.type(1 - mass)
    kept[-1] = True
    return _keep(scores, order[kept])


def keep_min_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep tokens with at least `share` of the likeliest one's probability."""
    chances = softmax(scores)
    kept = chances >= scores.dtype.type(share) * chances.max()
    kept[chances.argmax()] = True
    return _keep(scores, kept)


def keep_typical(scores: np.ndarray, mass: float) -> np.ndarray:
    """Keep tokens whose information is nearest to the distribution's entropy, up to `mass`."""
    logs = log_softmax(scores)
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(logs * np.exp(logs), dtype=scores.dtype)
    distance = np.abs(-logs - entropy)
    order = np.argsort(distance, kind="stable")
    below = _running_sum(softmax(scores[order])) < scores.dtype.type(mass)
    last = min(int(below.sum()), len(order) - 1)
    kept = distance[order] <= distance[order[last]]
    kept[0] = True
    return _keep(scores, order[kept])


def keep_epsilon(scores: np.ndarray, cutoff: float) -> np.ndarray:
    """Keep tokens with at least the probability `cutoff`."""
    return _keep(scores, (softmax(scores) >= scores.dtype.type(cutoff)) | (scores >= scores.max()))


def keep_eta(scores: np.ndarray, cutoff: float) -> np.ndarray:
    """Keep tokens as `keep_epsilon` does, with a threshold that falls with the distribution's entropy."""
    kind = scores.dtype.type
    logs, chances = log_softmax(scores), softmax(scores)
    entropy = -np.sum(np.maximum(logs, np.finfo(logs.dtype).min) * chances, dtype=scores.dtype)
    floor = min(kind(cutoff), np.sqrt(kind(cutoff)) * np.exp(-entropy))
    return _keep(scores, (chances >= floor) | (scores >= scores.max()))


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials: np.ndarray = np.exp(scores - scores.max())
    out: np.ndarray = exponentials / exponentials.sum()
    return out


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    out: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return out


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Return the sums of the first 1, 2, ... values, each rounded once, as in torch."""
    return np.cumsum(values, dtype=np.float64).astype(values.dtype)


def _keep(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Set all scores to -inf but those of the tokens `kept` (indices, or a mask)."""
    out = np.full_like(scores, -np.inf)
    out[kept] = scores[kept]
    return out
