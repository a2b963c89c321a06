"""Exact integer products by float or tensor-core BLAS: the portable fast version of reference.py.

Codes are centred privately (uint8 − 128) where sums would be too large, images become columns, a
filter row's taps side by side, and engines.py multiplies them exactly. Float operands (Identity)
take the same road. What leaves is bit for bit what reference.py gives for integers.
"""
import numpy as np

from minifqt.backend import array_module, empty, map_blocks, one_blas_thread, scratch
from minifqt.kernels.engines import Floats, engine_of
from minifqt.kernels.reference import first_to_last, output_size
from minifqt.qtensor import QTensor

PARTS, LEAST = 8, 1 << 18                                 # pieces of work, and columns worth one


class Terms:
    """The zeros, scales and centres of two integer operands, as they stand in the result."""

    def __init__(self, a, b, centres, turn_a=lambda v: v, turn_b=lambda v: v):
        self.zero_a, self.zero_b = (turn_a(a.zero.astype("float64")),
                                    turn_b(b.zero.astype("float64")))
        self.scale = turn_a(a.scale.astype("float64")) * turn_b(b.scale.astype("float64"))
        self.centre_a, self.centre_b = centres
        on_cpu = array_module(a.codes) is np              # else asking costs a sync: form all terms
        self.b1_matters, self.a1_matters = (bool(z.any()) if on_cpu else True
                                            for z in (self.zero_a, self.zero_b))

    def finish(self, ab, b1, a1, n, out, rows=None):
        """out = reference.epilogue of sums over centred codes; without `needs_a1`, no a1, n.

        rows  the samples of this block, where a's scale and zero may differ from sample to sample
        """
        scale, zero_a = (v if rows is None or len(v) == 1 else v[rows]
                         for v in (self.scale, self.zero_a))
        xp = array_module(ab)
        if self.scale_alone:
            return xp.multiply(ab, scale, out=out, dtype="float64")
        y = scratch("finished", ab.shape, "float64", xp)
        y[...] = ab                                       # integers, exact, up to the first zero
        if self.centre_a:
            y += self.centre_a * b1
        if self.centre_b:
            y += self.centre_b * a1 + self.centre_a * self.centre_b * n
            b1 = b1 + self.centre_b * n
        if self.b1_matters:
            y -= (xp.multiply(zero_a, b1, out=scratch("term", y.shape, "float64", xp))
                  if len(zero_a) > 1 else zero_a * b1)
        if self.a1_matters:
            y -= self.zero_b * (a1 + self.centre_a * n)
        if self.b1_matters and self.a1_matters:
            y += (zero_a * self.zero_b) * n
        return xp.multiply(y, scale, out=out)             # rounded as it is stored

    @property
    def scale_alone(self):
        """Whether Σab but for the scale is the result."""
        return not (self.centre_a or self.b1_matters or self.needs_a1)

    @property
    def needs_a1(self):
        """Whether Σa1 and Σ11 have a part in the result."""
        return self.centre_b or self.a1_matters


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    engine, xp = engine_of(a, b, weights=True), array_module(a.codes)
    right = engine.load(b.codes).astype(engine.dtype)
    M, K = a.shape
    y = xp.empty((M, len(right)), engine.result)
    if engine.exact:
        terms = Terms(a, b, engine.centres(a, b), turn_b=first_to_last)
        b1 = right.sum(axis=1, dtype="float64")[None]     # (1, J)

    def block(rows):
        left = engine.load(a.codes[rows]).astype(engine.dtype)
        sums = engine.dot((left, right.T))
        if engine.exact:
            a1 = left.sum(axis=1, dtype="float64")[:, None]
            terms.finish(sums, b1, a1, K, y[rows], rows)
        else:
            y[rows] = sums

    run(engine, block, M, piece(M, K))
    return y


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C."""
    (N, H, W, _), (K, R, S, _) = x.shape, w.shape
    P, Q = output_size((H, W), (R, S), stride, padding)
    y = empty((N, P, Q, K), engine_of(x, w).result, array_module(x.codes))
    correlate(x, w, (H + 2 * padding, W + 2 * padding), (padding, padding), stride, y)
    return y


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    Pixels f, f + stride, … of dx meet the taps r ≡ f + padding alone: stride² dense correlations of
    g with the turned w.
    """
    R, S, C = w.shape[1:]
    dx = empty((len(g.codes), *size, C), engine_of(g, w).result, array_module(g.codes))
    for f in np.ndindex(min(stride, size[0]), min(stride, size[1])):
        r, s = ((side + padding) % stride for side in f)
        part, taps = dx[:, f[0]::stride, f[1]::stride], w.codes[:, r::stride, s::stride]
        if taps.size == 0:
            part[...] = 0
            continue
        turned = QTensor(                                 # (C, R, S, K)
            taps[:, ::-1, ::-1].swapaxes(0, 3), first_to_last(w.scale), first_to_last(w.zero))
        last = [count - 1 for count in taps.shape[1:3]]
        canvas = [side + more for side, more in zip(part.shape[1:3], last, strict=True)]
        offset = [more - (side + padding) // stride for side, more in zip(f, last, strict=True)]
        correlate(g, turned, canvas, offset, 1, part)
    return dx


def correlate(a, b, canvas, offset, stride, y):
    """y (N, P, Q, K) = Σ over taps and channels of b (K, R, S, C) times a (N, …, C).

    a is placed on a canvas of absent pixels.
    """
    engine, xp = engine_of(a, b, weights=True), array_module(a.codes)
    (K, R, S, C), (N, *out, _) = b.shape, y.shape
    weights = engine.load(b.codes).astype(engine.dtype)
    if engine.exact:
        terms = Terms(a, b, engine.centres(a, b), turn_b=first_to_last)
        if terms.needs_a1:                                # one filter more, of ones, yields Σa1
            weights = xp.concatenate([weights, xp.ones((1, R, S, C), weights.dtype)])
    group = min(R, engine.filter_rows)
    filters = [xp.ascontiguousarray(weights[:, r:r + group].reshape(len(weights), -1).T)
               for r in range(0, R, group)]

    def sums(codes):
        image = place(codes, engine, canvas, offset)
        taps = columns(image, (R, S), out, stride, group, engine.dtype)
        pairs = zip(taps, filters, strict=True)
        return engine.dot(*pairs).reshape(-1, *out, len(weights))

    b1 = n = None
    if engine.exact and not terms.scale_alone:
        with one_blas_thread():                           # one image's work: where taps are present
            present = sums(xp.ones((1, *a.shape[1:]), "int8")).astype("float64")
        b1, n = present[..., :K], present[..., K:]

    def block(rows):
        ab = sums(a.codes[rows])
        if engine.exact:
            terms.finish(ab[..., :K], b1, ab[..., K:], n, y[rows], rows)
        else:
            y[rows] = ab

    run(engine, block, N, images(engine, N, canvas[0] * out[1] * S * C))


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q.

    Σ1x, Σg1 and Σ11 are the same product of sums over images.
    """
    engine, xp = engine_of(g, x), array_module(g.codes)
    (N, P, Q, _), (_, H, W, C), (R, S) = g.shape, x.shape, kernel
    canvas, group = (H + 2 * padding, W + 2 * padding), min(R, engine.filter_rows)

    def product(left, image, engine):
        left = left.reshape(len(left), P * Q, -1)
        taps = columns(image, kernel, (P, Q), stride, group, engine.dtype)
        sums = xp.empty((left.shape[2], len(taps), taps[0].shape[2]))
        for i, some in enumerate(taps):
            sums[:, i] = engine.gather(left, some)
        return sums.reshape(len(sums), R, S, -1)

    def placed(codes):
        return place(codes, engine, canvas, (padding, padding))

    def part(rows):
        left, image = engine.load(g.codes[rows]).astype(engine.dtype), placed(x.codes[rows])
        sums = [engine.over_images(v) for v in (left, image) if engine.exact]
        return [product(left, image, engine), *sums]

    parts = run(engine, part, N, images(engine, N, canvas[0] * Q * S * C))
    gx, *rest = (sum(some[1:], some[0].astype("float64")) for some in zip(*parts, strict=True))
    if not engine.exact:
        return gx.astype(engine.dtype)
    (left, image), floats = rest, Floats("float64", engine.columns)
    ones = xp.ones((1, P, Q, 1))
    present = placed(xp.ones((1, H, W, 1), "int8")).astype("float64")
    with one_blas_thread():
        return Terms(g, x, engine.centres(g, x), turn_a=first_to_last).finish(
            gx, product(ones, image, floats), product(left, present, floats),
            N * product(ones, present, floats), xp.empty(gx.shape, "float32"))


def images(engine, count, size):
    """Images in one piece of work, of so many columns each: those that fit the cache."""
    return max(1, min(engine.columns // max(1, size), piece(count, size), 1 << 16))


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


def place(codes, engine, canvas, offset):
    """Centred codes on a canvas of zeros, pixel (p, q) at offset + (p, q); scratch.

    (n, P, Q, C) → (n, *canvas, C). Pixels that fall outside are those that no tap reads.
    """
    n, P, Q, C = codes.shape
    codes = engine.load(codes)
    image = scratch("canvas", (n, *canvas, C), codes.dtype, array_module(codes))
    image[...] = 0
    (p0, p1), (q0, q1) = (inside(length, edge, shift, 1)
                          for length, edge, shift in zip((P, Q), canvas, offset, strict=True))
    image[:, offset[0] + p0:offset[0] + p1, offset[1] + q0:offset[1] + q1] = codes[:, p0:p1, q0:q1]
    return image


def inside(length, edge, shift, spread):
    """The pixels first .. last − 1 of `length` that land on 0 .. edge − 1."""
    first = max(0, -(shift // spread))
    last = min(length, (edge - 1 - shift) // spread + 1)
    return first, max(first, last)


def columns(image, kernel, out, stride, group, dtype):
    """What the taps of rows r .. r + group − 1 of the filter read, for r = 0, group, 2 · group, …

    image (n, …, C), C-ordered → R / group times (n, P · Q, group · S · C), P × Q the output's size,
    in this dtype; scratch. Rows of an image that several rows of the filter read are copied once.
    """
    (R, S), (P, Q), (n, *_, C), xp = kernel, out, image.shape, array_module(image)
    by_image, by_row, by_pixel, item = image.strides
    starts, copies, flat = range(0, R, group), [], image.reshape(-1)
    for r in starts[:stride]:                             # the taps of a pixel are one run in NHWC
        shape = (n, (R - group - r) // stride + P, Q, group, S * C)
        view = xp.ndarray(shape, image.dtype, flat[r * by_row // item:].data, strides=(
            by_image, stride * by_row, stride * by_pixel, by_row, item))
        copies.append(scratch(f"columns{r}", shape, dtype, xp))
        copies[-1][...] = view
    return [copies[r % stride][:, r // stride:r // stride + P].reshape(n, P * Q, -1)
            for r in starts]
