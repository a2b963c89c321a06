"""What multiplies matrices for blas.py: BLAS on floats, BLAS on integers in float32, tensor cores.

An engine says in which type operands stand (`dtype`), how many terms it sums exactly (`slab`), and
how many columns it takes at a time. Each sum is cut so that nothing is rounded or wraps.
"""
import numpy as np

from minifqt.backend import array_module, scratch


class Floats:
    """Plain products of Identity operands, float32 or float64."""

    exact, slab = False, 1 << 62                          # terms that a partial sum holds
    filter_rows = 1                                       # whose taps stand in one column

    def __init__(self, dtype, columns):
        self.dtype, self.result, self.columns = dtype, dtype, columns

    def load(self, codes):
        return codes

    def dot(self, *pairs):
        """Σ a b of pairs (…, M, k), (…, k, J); integers exact, past one slab in float64."""
        long = sum(a.shape[-1] for a, _ in pairs) > self.slab
        if long:
            pairs = [(a[..., start:start + self.slab], b[..., start:start + self.slab, :])
                     for a, b in pairs for start in range(0, a.shape[-1], self.slab)]
        total = self.product(*pairs[0])
        total = total.astype("float64") if long else total
        for a, b in pairs[1:]:
            total += self.product(a, b)
        return total

    def product(self, a, b):
        return a @ b

    def gather(self, a, b):
        """Σ over images and pixels.  (n, PQ, K), (n, PQ, J) → (K, J) float64."""
        return self.dot((a.swapaxes(1, 2), b)).sum(axis=0, dtype="float64")


class Sgemm(Floats):
    """Integers in float32 BLAS: partial sums are integers below 2²⁴, held exactly, in any order."""

    exact, dtype, result, columns = True, "float32", "float32", 1 << 20
    slab = 2**24 // (128 * 128)                           # 1,024 terms of centred codes

    def __init__(self):
        pass

    def load(self, codes):
        """Codes as int8, uint8 moved to −128..127: the top bit turned."""
        return (codes ^ 128).view("int8") if centre(codes) else codes

    def centres(self, *tensors):
        """What `load` takes off each tensor's codes."""
        return [centre(t.codes) for t in tensors]

    def over_images(self, v):
        """Σ over fewer than 2¹⁷ images.  (n, …) → (1, …)."""
        floats = v if v.dtype == np.float32 else scratch("summed", v.shape)
        if floats is not v:                               # BLAS is the fastest to sum
            floats[...] = v
        return (np.ones(len(v), "float32") @ floats.reshape(len(v), -1)).reshape(1, *v.shape[1:])

    def gather(self, a, b):
        images = self.slab // a.shape[1]                  # so many still add up exactly
        if images < 2:
            return super().gather(a, b)
        sums = self.dot((a.swapaxes(1, 2), b))
        parts = [sums[n:n + images].sum(axis=0) for n in range(0, len(sums), images)]
        return sum(parts[1:], parts[0].astype("float64"))


class Narrow(Sgemm):
    """Codes as they are, uncentred, beside weights so small that float32 holds any partial sum."""

    slab, largest = 1 << 62, 2**24                        # 255 Σ|w| and 255 Σ1 are below

    def load(self, codes):
        return codes

    def centres(self, *tensors):
        return [0 for _ in tensors]

    @classmethod
    def fits(cls, a, w):
        """a uint8, w (K, …) int8, all of whose axes but the first are contracted."""
        if (a.codes.dtype, w.codes.dtype) != (np.uint8, np.int8) or not w.codes.size:
            return False
        rows = w.codes.reshape(len(w.codes), -1)
        most = max(int(np.abs(rows, dtype="int32").sum(axis=1).max()), rows.shape[1])
        return 255 * most < cls.largest


class TensorCores(Sgemm):
    """int8 GEMMs with int32 accumulation (cuBLAS): cupy.matmul would return int8, wrapped."""

    dtype, columns = "int8", 1 << 62
    slab = 65536                                          # · 128 · 128 = 2³⁰ < 2³¹
    filter_rows = 1 << 62                                 # all: one large product

    def __init__(self, gemm=None):
        self.gemm = gemm or gemm_ex

    def product(self, a, b):
        """a b in float64, with zeros up to what the tensor cores take: k and J multiples of 16."""
        xp, (k, J) = array_module(a), b.shape
        a = a.reshape(-1, k)
        left, right = (xp.zeros((len(a), -(-k // 16) * 16), "int8"),
                       xp.zeros((-(-J // 16) * 16, -(-k // 16) * 16), "int8"))
        left[:, :k], right[:J, :k] = a, b.T
        return self.gemm(left, right)[:, :J].astype("float64")

    def over_images(self, v):
        return v.sum(axis=0, dtype="int64")[None]

    def gather(self, a, b):
        return self.dot((a.reshape(-1, a.shape[2]).T, b.reshape(-1, b.shape[2])))


def gemm_ex(a, b):
    """a bᵀ by cuBLAS gemmEx.  CuPy int8 (M, K), (J, K) → int32 (M, J); K, J multiples of 4.

    Row-major a bᵀ is cuBLAS's column-major TN form, the only one that int8 tensor cores take.
    """
    xp, (M, K), J = array_module(a), a.shape, b.shape[0]
    cublas, handle = xp.cuda.cublas, xp.cuda.device.get_cublas_handle()
    out, one, zero = xp.empty((M, J), "int32"), np.array(1, "int32"), np.array(0, "int32")
    int8, int32, compute = 3, 10, 72  # CUDA_R_8I, CUDA_R_32I, CUBLAS_COMPUTE_32I
    mode = cublas.getPointerMode(handle)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    try:
        cublas.gemmEx(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, J, M, K,
                      one.ctypes.data, b.data.ptr, int8, K, a.data.ptr, int8, K,
                      zero.ctypes.data, out.data.ptr, int32, J, compute, -1)
    finally:
        cublas.setPointerMode(handle, mode)
    return out


def engine_of(a, b, weights=False):
    """How the product of these two tensors is computed; `weights`: b's rows are contracted."""
    integer, on_cpu = a.is_integer and b.is_integer, array_module(a.codes) is np
    if integer and on_cpu:
        return Narrow() if weights and Narrow.fits(a, b) else Sgemm()
    if integer:
        return TensorCores()
    return Floats(a.codes.dtype.name, Sgemm.columns if on_cpu else TensorCores.columns)


def centre(codes):
    return 128 if codes.dtype == np.uint8 else 0
