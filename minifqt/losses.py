"""Softmax cross-entropy and its gradient, formed together."""
import numpy as np

from minifqt.backend import Array, array_module


def cross_entropy(logits: Array, labels: Array,
                  label_smoothing: float = 0.0) -> tuple[Array, Array]:
    """Mean over the batch of −Σ_k t_k log softmax(logits)_k, and its gradient.

    logits (N, K), labels (N,) integers
    label_smoothing  ε: the target t is (1 − ε) · onehot + ε / K, over all classes as in PyTorch
    Returns the loss, a float64 scalar, and dlogits (N, K) in logits' dtype.
    Raises ValueError where shapes, labels or ε do not fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {logits.shape}: expected (N, classes).")
    xp, (N, K) = array_module(logits), logits.shape
    labels = labels if hasattr(labels, "dtype") else xp.asarray(labels)
    if labels.shape != (N,) or N == 0 or not 0 <= label_smoothing <= 1:
        raise ValueError(f"logits {logits.shape}, labels {labels.shape}, label_smoothing "
                         f"{label_smoothing}: expected one label a row, at least one row, and a "
                         "smoothing in [0, 1].")
    if array_module(labels) is not xp or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {type(labels).__name__} {labels.dtype}: expected integers "
                         "beside the logits, on the same device.")
    if xp is np and (labels.min() < 0 or labels.max() >= K):
        raise ValueError(f"labels {labels.min()}..{labels.max()} for {K} classes: expected "
                         f"0..{K - 1}. Build the model with the data's number of classes.")
    shifted = logits.astype("float64") - logits.max(axis=1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))      # (N, K)
    target = xp.full((N, K), label_smoothing / K)
    target[xp.arange(N), labels] += 1 - label_smoothing
    loss = -(target * log_p).sum() / N
    return loss, ((xp.exp(log_p) - target) / N).astype(logits.dtype)
