"""Exact integer products by float or tensor-core BLAS: the portable fast version of reference.py.

Codes are centred privately (uint8 − 128), images become columns block by block in cache, and the
contraction is cut into slabs short enough that no partial sum is rounded or wraps: float32 BLAS on
a CPU, int8 × int8 → int32 on a GPU. Float operands (Identity) take the same road without centring.
What leaves is bit for bit what reference.py gives for integers.
"""
import numpy as np

from minifqt.backend import array_module, map_blocks, one_blas_thread
from minifqt.kernels.reference import epilogue, first_to_last, output_size
from minifqt.qtensor import QTensor

PARTS, LEAST = 8, 1 << 18                                 # pieces of work, and columns worth one


class Floats:
    """Plain products of Identity operands, float32 or float64."""

    exact = False

    def __init__(self, dtype, columns):
        self.dtype, self.columns = dtype, columns

    def load(self, codes):
        return codes

    def dot(self, a, b):
        """Σ_k a[m, k] · b[j, k].  (M, K), (J, K) → (M, J)."""
        return a @ b.T


class Sgemm:
    """Integers in float32 BLAS: partial sums are integers below 2²⁴, held exactly, in any order."""

    exact, dtype, columns = True, "float32", 1 << 20
    slab = 2**24 // (128 * 128)                           # 1,024 terms of centred codes

    def load(self, codes):
        """Codes as floats, uint8 moved to −128..127."""
        return codes.astype("float32") - np.float32(centre(codes))

    def dot(self, a, b):
        """Exact Σ_k a[m, k] · b[j, k] in float64."""
        K = a.shape[1]
        total = (a[:, :self.slab] @ b[:, :self.slab].T).astype("float64")
        for start in range(self.slab, K, self.slab):
            total += a[:, start:start + self.slab] @ b[:, start:start + self.slab].T
        return total


class TensorCores:
    """int8 GEMMs with int32 accumulation (cuBLAS): cupy.matmul would return int8, wrapped."""

    exact, dtype, columns = True, "int8", 1 << 62
    slab = 65536                                          # · 128 · 128 = 2³⁰ < 2³¹

    def __init__(self, gemm=None):
        self.gemm = gemm or gemm_ex

    def load(self, codes):
        """Codes as int8, uint8 moved to −128..127."""
        return (codes.astype("int16") - centre(codes)).astype("int8")

    def dot(self, a, b):
        """Exact Σ_k a[m, k] · b[j, k] in float64."""
        slabs = [slice(start, start + self.slab) for start in range(0, a.shape[1], self.slab)]
        return sum(self._product(a[:, s], b[:, s]).astype("float64") for s in slabs)

    def _product(self, a, b):
        """a bᵀ, with zeros up to what the tensor cores take: K and J multiples of 16."""
        xp, (M, K), J = array_module(a), a.shape, b.shape[0]
        left, right = (xp.zeros((M, -(-K // 16) * 16), "int8"),
                       xp.zeros((-(-J // 16) * 16, -(-K // 16) * 16), "int8"))
        left[:, :K], right[:J, :K] = a, b
        return self.gemm(left, right)[:, :J]


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


def engine_of(a, b):
    """How the product of these two tensors is computed."""
    integer, on_cpu = a.is_integer and b.is_integer, array_module(a.codes) is np
    if integer:
        return Sgemm() if on_cpu else TensorCores()
    return Floats(a.codes.dtype.name, Sgemm.columns if on_cpu else TensorCores.columns)


def centre(codes):
    return 128 if codes.dtype == np.uint8 else 0


class Terms:
    """The zeros, scales and centres of two integer operands, as they stand in the result."""

    def __init__(self, a, b, turn_a=lambda v: v, turn_b=lambda v: v, centres=None):
        self.zero_a, self.zero_b = (turn_a(a.zero.astype("float64")),
                                    turn_b(b.zero.astype("float64")))
        self.scale = turn_a(a.scale.astype("float64")) * turn_b(b.scale.astype("float64"))
        self.centre_a, self.centre_b = centres or (centre(a.codes), centre(b.codes))
        on_cpu = array_module(a.codes) is np              # else asking costs a sync: form all terms
        self.b1_matters, self.a1_matters = (bool(z.any()) if on_cpu else True
                                            for z in (self.zero_a, self.zero_b))

    def finish(self, ab, b1, a1, n, rows=None):
        """Epilogue of sums over centred codes; a1 may be None if no centre or zero of b needs it.

        rows  the samples of this block, where a's scale and zero may differ from sample to sample
        """
        scale, zero_a = (v if rows is None or len(v) == 1 else v[rows]
                         for v in (self.scale, self.zero_a))
        ab = ab + self.centre_a * b1 if self.centre_a else ab
        if self.centre_b:
            ab = ab + self.centre_b * a1 + self.centre_a * self.centre_b * n
        b1 = b1 + self.centre_b * n if self.b1_matters else None
        a1 = a1 + self.centre_a * n if self.a1_matters else None
        return epilogue(ab, b1, a1, n, scale, zero_a, self.zero_b)


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    engine, xp = engine_of(a, b), array_module(a.codes)
    right = engine.load(b.codes)
    M, K = a.shape
    y = xp.empty((M, len(right)), "float32" if engine.exact else engine.dtype)
    if engine.exact:
        terms = Terms(a, b, turn_b=first_to_last)
        b1 = right.sum(axis=1, dtype="float64")[None]     # (1, J)

    def block(rows):
        left = engine.load(a.codes[rows])
        sums = engine.dot(left, right)
        if engine.exact:
            a1 = left.sum(axis=1, dtype="float64")[:, None]
            sums = terms.finish(sums, b1, a1, K, rows)
        y[rows] = sums

    run(engine, block, M, piece(M, K))
    return y


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C."""
    (_, H, W, _), (_, R, S, _) = x.shape, w.shape
    out = output_size((H, W), (R, S), stride, padding)
    return correlate(x, w, (H + 2 * padding, W + 2 * padding), (padding, padding), 1, out, stride)


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    g, spread by the stride, is correlated with the turned w.
    """
    R, S = w.shape[1:3]
    turned = QTensor(                                     # (C, R, S, K)
        w.codes[:, ::-1, ::-1].swapaxes(0, 3), first_to_last(w.scale), first_to_last(w.zero))
    canvas, offset = (size[0] + R - 1, size[1] + S - 1), (R - 1 - padding, S - 1 - padding)
    return correlate(g, turned, canvas, offset, stride, size, 1)


def correlate(a, b, canvas, offset, spread, out, stride):
    """Σ over taps and channels of b (K, R, S, C) times a (N, …, C) → (N, *out, K).

    a is placed on a canvas of absent pixels.
    """
    engine, xp = engine_of(a, b), array_module(a.codes)
    (K, R, S, C), (P, Q), N = b.shape, out, len(a.codes)
    weights = xp.ascontiguousarray(engine.load(b.codes).reshape(K, -1))
    y = xp.empty((N, P, Q, K), "float32" if engine.exact else engine.dtype)
    if engine.exact:
        terms = Terms(a, b, turn_b=first_to_last)
        ones = xp.ones((1, *a.shape[1:3], C), "int8")     # one image's work: where taps are present
        present = windows(place(ones, engine, canvas, offset, spread), (R, S), (P, Q), stride)
        n = present.sum(axis=1, dtype="float64").reshape(1, P, Q, 1)
        with one_blas_thread():
            b1 = engine.dot(present, weights).reshape(1, P, Q, K)
    needs_a1 = engine.exact and (terms.centre_b or terms.a1_matters)
    # Rows of output whose columns fit the cache.
    band = max(1, min(P, engine.columns // max(1, Q * R * S * C)))

    def block(rows):
        image = place(a.codes[rows], engine, canvas, offset, spread)
        for top in range(0, P, band):
            p = min(band, P - top)
            columns = windows(image[:, top * stride:], (R, S), (p, Q), stride)
            sums = engine.dot(columns, weights).reshape(-1, p, Q, K)
            if engine.exact:
                part = slice(top, top + p)
                a1 = columns.sum(axis=1, dtype="float64").reshape(-1, p, Q, 1) if needs_a1 else None
                sums = terms.finish(sums, b1[:, part], a1, n[:, part], rows)
            y[rows, top:top + p] = sums

    fit = engine.columns // max(1, P * Q * R * S * C)     # images whose columns fit the cache
    run(engine, block, N, max(1, min(fit, piece(N, P * Q * R * S * C))))
    return y


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q.

    A channel of ones beside both operands, absent where x is padded, yields all four sums in one
    product.
    """
    engine, xp = engine_of(g, x), array_module(g.codes)
    (N, P, Q, K), (_, H, W, C), (R, S) = g.shape, x.shape, kernel
    one, canvas = int(engine.exact), (H + 2 * padding, W + 2 * padding)
    width = R * S * (C + one)
    images = max(1, engine.columns // max(1, P * Q * width))
    band = max(1, min(P, engine.columns // max(1, Q * width)))

    def part(rows):
        total = xp.zeros((K + one, width), "float64")
        for start in range(rows.start, rows.stop, images):
            some = slice(start, min(start + images, rows.stop))
            left = place(g.codes[some], engine, (P, Q), (0, 0), 1, one)
            image = place(x.codes[some], engine, canvas, (padding, padding), 1, one)
            for top in range(0, P, band):
                p = min(band, P - top)
                columns = windows(image[:, top * stride:], kernel, (p, Q), stride)
                total += engine.dot(left[:, top:top + p].reshape(-1, K + one).T, columns.T)
        return total

    total = sum(run(engine, part, N, piece(N, P * Q * width))).reshape(K + one, R, S, C + one)
    if not engine.exact:
        return total.astype(engine.dtype)
    return Terms(g, x, turn_a=first_to_last).finish(
        total[:K, ..., :C], total[K:, ..., :C], total[:K, ..., C:], total[K:, ..., C:])


def piece(count, columns):
    """Samples in one piece of work, of so many columns each.

    Cut by shape alone, so that the number of threads changes no float sum.
    """
    return max(1, -(-count // PARTS), LEAST // max(1, columns))


def run(engine, function, count, size):
    """Blocks on all threads; on a GPU one block."""
    if engine.columns > 1 << 32:
        return [function(slice(0, count))]
    return map_blocks(function, count, size)


def place(codes, engine, canvas, offset, spread, one=0):
    """Centred codes on a canvas of zeros, pixel (p, q) at offset + spread · (p, q).

    (n, P, Q, C) → (n, *canvas, C + one): `one` adds a channel of ones to them. Pixels that fall
    outside are those that no tap reads.
    """
    xp, (n, P, Q, C) = array_module(codes), codes.shape
    image = xp.zeros((n, *canvas, C + one), engine.dtype)
    (p0, p1), (q0, q1) = (inside(length, edge, shift, spread)
                          for length, edge, shift in zip((P, Q), canvas, offset, strict=True))
    down = slice(offset[0] + spread * p0, offset[0] + spread * (p1 - 1) + 1, spread)
    right = slice(offset[1] + spread * q0, offset[1] + spread * (q1 - 1) + 1, spread)
    if p1 > p0 and q1 > q0:
        image[:, down, right, :C] = engine.load(codes[:, p0:p1, q0:q1])
        image[:, down, right, C:] = 1
    return image


def inside(length, edge, shift, spread):
    """The pixels first .. last − 1 of `length` that land on 0 .. edge − 1."""
    first = max(0, -(shift // spread))
    last = min(length, (edge - 1 - shift) // spread + 1)
    return first, max(first, last)


def windows(image, kernel, out, stride):
    """Columns (n · P · Q, R · S · C): a filter row's S taps are a run of S · C numbers in NHWC."""
    xp, (R, S), (P, Q) = array_module(image), kernel, out
    n, _, _, C = image.shape
    by_image, by_row, by_pixel, item = image.strides
    view = xp.lib.stride_tricks.as_strided(
        image, (n, P, Q, R, S * C), (by_image, stride * by_row, stride * by_pixel, by_row, item))
    return view.reshape(n * P * Q, R * S * C)
