"""The authors' generator once more, written from its description in NumPy, float64, position by position.

Slow and plain on purpose: no batching of positions, no cache, no packed mask, rotations as complex numbers. It reads
weights by the authors' names.
"""

import numpy as np

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + 1e-5) * weight


def turns(position: int, side: int, head_dim: int) -> np.ndarray:
    """Complex factors of the pairs of a head: first half by the row, second half by the column."""
    half = head_dim // 2
    frequencies = np.array([10000.0 ** (-2 * i / half) for i in range(half // 2)])
    row, column = divmod(position, side)
    return np.exp(1j * np.concatenate([row * frequencies, column * frequencies]))


def rotated(heads: np.ndarray, factors: np.ndarray) -> np.ndarray:
    pairs = (heads[:, 0::2] + 1j * heads[:, 1::2]) * factors
    out = np.empty_like(heads)
    out[:, 0::2], out[:, 1::2] = pairs.real, pairs.imag
    return out


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def prefix(weights: Weights, condition: np.ndarray) -> np.ndarray:
    """A class number or text features (120, C) to the embedded prefix."""
    if condition.ndim == 0:
        return weights["cls_embedding.embedding_table.weight"][int(condition)][None]
    hidden = gelu_tanh(condition @ weights["cls_embedding.cap_proj.fc1.weight"].T)
    return hidden @ weights["cls_embedding.cap_proj.fc2.weight"].T


def logits(
    weights: Weights,
    codes: np.ndarray,
    condition: np.ndarray,
    *,
    num_heads: int,
    side: int,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """(L, V) of one image: row i is what codes before i and the condition say about code i.

    Args:
        weights: by the authors' names.
        codes: (L,), of which the last is not looked at.
        condition: class number (an array without axes) or text features (120, C).
        num_heads: attention heads, with as many of keys and values.
        side: of the grid.
        valid: bool (120,), which text tokens are none of the padding.
    """
    embedded = prefix(weights, condition)
    num_condition = len(embedded)
    x = np.concatenate([embedded, weights["tok_embeddings.weight"][codes[:-1]]])
    length, dim = x.shape
    head_dim = dim // num_heads
    visible = np.ones(length, bool) if valid is None else np.concatenate([valid, np.ones(length - num_condition, bool)])
    for layer in range(sum(name.endswith("attention_norm.weight") for name in weights)):
        w = {name.removeprefix(f"layers.{layer}."): v for name, v in weights.items() if f"layers.{layer}." in name}
        queries, keys, values = [], [], []
        for t in range(length):
            packed = w["attention.wqkv.weight"] @ rms_norm(x[t], w["attention_norm.weight"])
            q, k, v = packed.reshape(3, num_heads, head_dim)
            # Condition tokens have no place in the plane; the authors' table is zero there.
            place = turns(t - num_condition, side, head_dim) if t >= num_condition else np.zeros(head_dim // 2)
            queries.append(rotated(q, place))
            keys.append(rotated(k, place))
            values.append(v)
        for t in range(length):
            seen = [s for s in range(t + 1) if visible[s] or s == t]
            out = np.empty((num_heads, head_dim))
            for h in range(num_heads):
                scores = np.array([queries[t][h] @ keys[s][h] for s in seen]) / np.sqrt(head_dim)
                p = np.exp(scores - scores.max())
                out[h] = sum(p_s * values[s][h] for p_s, s in zip(p / p.sum(), seen, strict=True))
            x[t] = x[t] + w["attention.wo.weight"] @ out.reshape(-1)
        for t in range(length):
            y = rms_norm(x[t], w["ffn_norm.weight"])
            gate = w["feed_forward.w1.weight"] @ y
            x[t] = x[t] + w["feed_forward.w2.weight"] @ (gate / (1 + np.exp(-gate)) * (w["feed_forward.w3.weight"] @ y))
    last = x[num_condition - 1 :]
    return np.stack([weights["output.weight"] @ rms_norm(row, weights["norm.weight"]) for row in last])


def greedy(
    weights: Weights,
    condition: np.ndarray,
    null: np.ndarray,
    *,
    count: int,
    scale: float,
    interval: int,
    **settings: object,
) -> list[int]:
    """Codes by argmax, everything computed anew for every code; guidance up to decode step ``interval``."""
    codes: list[int] = []
    for i in range(count):
        so_far = np.array([*codes, 0])
        found = logits(weights, so_far, condition, **settings)[-1]
        decode_step = i - 1  # the first code comes from reading the condition, which is always guided
        if scale > 1 and (interval < 0 or decode_step <= interval):
            other = logits(weights, so_far, null, **settings)[-1]
            found = other + scale * (found - other)
        codes.append(int(found.argmax()))
    return codes


def cross_entropy(scores: np.ndarray, codes: np.ndarray) -> float:
    shifted = scores - scores.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(codes)), codes].mean())
