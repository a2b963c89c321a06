"""Per-sample quantizer: each sample has its own range, so one large gradient coarsens no other."""
from minifqt.backend import Array
from minifqt.qtensor import QTensor
from minifqt.quantizers.affine import fitted
from minifqt.quantizers.base import Quantizer, register
from minifqt.rng import Stream


@register("psq")
class PSQ(Quantizer):
    """One scale and one real zero a sample: scale_i = R_i / B, zero_i = −min_i / scale_i.

    Var = Σ_i scale_i² Σ_j p(1 − p) ≤ D/4B² · Σ R_i², never above PTQ's bound.
    May enter dgrad, not wgrad.
    Source: arXiv 2010.14298, the per-sample quantizer. Plain form: kernels/reference.psq.
    """
    per_sample = True

    def __call__(self, x: Array, stream: Stream) -> QTensor:
        grid, rows = fitted(x, len(x), self.bins, stream), (len(x),) + (1,) * (x.ndim - 1)
        codes = grid.codes(stream, x.shape, self.bins)
        return QTensor(codes, grid.scale.reshape(rows), grid.zero.reshape(rows), name=stream.name)

    def variance(self, x: Array) -> Array:
        """scale_i² · p(1 − p).  float64, shape of x."""
        return fitted(x, len(x), self.bins).variance(self.bins).reshape(x.shape)

    def bound(self, x: Array) -> float:
        """D/4B² · Σ R_i².  # sync"""
        return float(fitted(x, len(x), self.bins).bound().sum())
