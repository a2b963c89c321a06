"""One generator of micro-kernels, and the few instructions that NumPy's language lacks.

A tile multiplies `rows` broadcast words by a row of vectors of words and keeps all sums in
registers; a panel is a grid of tiles. What is compiled is told by types alone (a tuple of 8 numbers
means 8 rows), so that numba can keep the machine code in its cache on disk. With AMX: amx.py. Next:
products.py.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minifqt.kernels.cpu import amx
from minifqt.kernels.cpu.choice import compiled

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
LINE = 64                                                 # bytes
BYTES, WORDS = ir.VectorType(ir.IntType(8), 16), ir.VectorType(I32, 16)


@intrinsic
def panel(typingctx, rows, vectors, like, a, b, c, loops, accumulate):
    """c[rows, lanes] (+)= Σ over three nested loops of word(a) · vector(b), tile by tile.

    rows, vectors  a tile's shape (Isa.tile): so many rows, vectors of so many lanes in each
    like   an array of packed codes, int8, int16 or float32: which instruction (choice.py)
    a      address, bytes between rows, rows (whole tiles of them are read); bytes between groups of
           so many rows, groups
    b      address, bytes between blocks of a tile's lanes, blocks
    c      address, sums between rows, sums between groups
    loops  three (count, bytes a moves, bytes b moves), the outermost first; the last passes words
    accumulate  a tuple, empty to start from zero
    """
    add, matrix = accumulate.count > 0, amx.is_matrix(rows)
    short, real = like.dtype == types.int16, like.dtype == types.float32
    signature = types.void(rows, vectors, like, a, b, c, loops, accumulate)

    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        a, b, c = (cgutils.unpack_tuple(builder, v) for v in arguments[3:6])
        nest = [cgutils.unpack_tuple(builder, v)
                for v in cgutils.unpack_tuple(builder, arguments[6])]
        if matrix:
            amx.panel(builder, a, b, c, nest, add)
            return context.get_dummy_value()
        M, V, L = rows.count, vectors.count, vectors.dtype.count
        (a, a_row, count, a_group, groups), (b, b_block, blocks), (c, pitch, c_group) = a, b, c
        number = lambda v: ir.Constant(I64, v)            # noqa: E731
        tiles = builder.udiv(builder.add(count, number(M - 1)), number(M))
        with (cgutils.for_range(builder, blocks) as block,
              cgutils.for_range(builder, groups) as group,
              cgutils.for_range(builder, tiles) as down):
            row = builder.mul(down.index, number(M))
            start = builder.add(a, builder.mul(group.index, a_group))
            place = builder.add(builder.mul(row, pitch), builder.mul(block.index, number(V * L)))
            place = builder.add(place, builder.mul(group.index, c_group))
            start = builder.add(start, builder.mul(row, a_row))
            _tile(builder, M, V, _Instruction(L, short, real), start, a_row,
                  builder.add(b, builder.mul(block.index, b_block)),
                  builder.add(c, builder.mul(place, number(4))), pitch, nest, add)
        return context.get_dummy_value()

    return signature, codegen


class _Instruction:
    """The instruction that adds word(a) · vector(b) to so many sums."""

    def __init__(self, lanes, short, real):
        self.lanes, self.short, self.real = lanes, short, real
        self.element = ir.FloatType() if real else I32
        self.wide = ir.VectorType(self.element, lanes)

    def add(self, builder, total, left, right):
        """total + left · right."""
        L, wide = self.lanes, self.wide
        name = (f"llvm.fma.v{L}f32" if self.real else "llvm.x86.avx2.pmadd.wd" if self.short else
                f"llvm.x86.avx512.vpdpbusd.{32 * L}")
        if not self.short:
            f = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(wide, [wide] * 3), name)
            return builder.call(f, [left, right, total] if self.real else [total, left, right])
        pairs = ir.VectorType(I16, 2 * L)
        f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(wide, [pairs] * 2), name)
        pair = builder.call(f, [builder.bitcast(v, pairs) for v in (left, right)])
        return builder.add(total, pair)


def _tile(builder, M, V, dots, a, a_row, b, c, pitch, loops, add):
    """IR of one tile in vector registers, M rows of V vectors, by the instruction `dots`."""
    number, L, wide = (lambda v: ir.Constant(I64, v)), dots.lanes, dots.wide
    undefined, zeros = ir.Constant(wide, ir.Undefined), ir.Constant(wide, [0] * L)
    everywhere = ir.Constant(ir.VectorType(I32, L), [0] * L)

    def place(m, v):
        row = builder.add(c, builder.mul(number(4 * m), pitch))
        return builder.add(row, number(4 * L * v))

    sums = {at: cgutils.alloca_once(builder, wide) for at in np.ndindex(M, V)}   # registers
    for at, total in sums.items():
        builder.store(_load(builder, place(*at), wide) if add else zeros, total)

    def nest(level, a, b):
        if level == 3:
            right = [_load(builder, builder.add(b, number(4 * L * v)), wide) for v in range(V)]
            for m in range(M):
                word = _load(builder, builder.add(a, builder.mul(a_row, number(m))), dots.element)
                single = builder.insert_element(undefined, word, ir.Constant(I32, 0))
                left = builder.shuffle_vector(single, undefined, everywhere)
                for v in range(V):
                    total = builder.load(sums[m, v])
                    builder.store(dots.add(builder, total, left, right[v]), sums[m, v])
            return
        count, a_step, b_step = loops[level]
        with cgutils.for_range(builder, count) as loop:
            nest(level + 1, builder.add(a, builder.mul(a_step, loop.index)),
                 builder.add(b, builder.mul(b_step, loop.index)))

    nest(0, a, b)
    for at, total in sums.items():
        _store(builder, builder.load(total), place(*at))


@intrinsic
def rows_of(typingctx, rows):
    """Rows of a tile."""
    count = amx.HEIGHT if amx.is_matrix(rows) else rows.count

    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        return ir.Constant(I64, count)

    return types.intp(rows), codegen


@compiled
def lanes_of(vectors):
    """Sums in a row of a tile with these vectors."""
    return len(vectors) * len(vectors[0])


@compiled
def lined(count, like):
    """So many numbers (count,) of the dtype of `like`, not set, that begin with a cache line."""
    memory = np.empty(count * like.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start:start + count * like.itemsize].view(like.dtype)


@intrinsic
def apart(typingctx):
    """Promises that no two arrays that this function is given share memory, if one is written to.

    Without it each loop first compares the addresses of all, or does without vectors.
    """
    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        given = builder.function.args[2:]                 # behind numba's own: result, exception
        kinds, byte = [value.type for value in given], ir.IntType(8).as_pointer()
        for i in range(len(given) - 4):
            if kinds[i:i + 4] == [byte, byte, I64, I64]:  # an array: owner, parent, sizes, data
                given[i + 4].add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def rint(typingctx, x):
    """x rounded to the nearest integer, ties to even, as np.rint; unlike it, vectorized."""
    def codegen(context, builder, signature, arguments):
        kind = arguments[0].type
        f = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]),
            f"llvm.rint.f{32 if kind == ir.FloatType() else 64}")
        return builder.call(f, arguments)

    return x(x), codegen


@intrinsic
def multiply_add(typingctx, x, y, z):
    """x · y + z, float64, rounded once: the bits of two operations where x · y is exact."""
    def codegen(context, builder, signature, arguments):
        f = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(arguments[0].type, [arguments[0].type] * 3),
            "llvm.fma.f64")
        return builder.call(f, arguments)

    return types.float64(types.float64, types.float64, types.float64), codegen


@intrinsic
def words16(typingctx, like, a, step, out):
    """Codes of `group` pixels, `step` bytes apart, of 16 channels side by side: 16 words at `out`.

    like  int8: four bytes a word; int16: two bytes, made signed
    """
    short = like.dtype == types.int16

    def codegen(context, builder, signature, arguments):
        _, a, step, out = arguments
        total, bits = None, 16 if short else 8
        for j in range(2 if short else 4):
            pixel = builder.add(a, builder.mul(step, ir.Constant(I64, j)))
            codes = _load(builder, pixel, BYTES)
            wide = (builder.zext(builder.sext(codes, ir.VectorType(I16, 16)), WORDS) if short
                    else builder.zext(codes, WORDS))
            wide = builder.shl(wide, ir.Constant(WORDS, [bits * j] * 16))
            total = wide if total is None else builder.or_(total, wide)
        _store(builder, total, out)
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp, types.intp), codegen


@intrinsic
def turn16(typingctx, like, a, step, out, pitch):
    """16 pixels, `step` bytes apart, of 16 channels → 16 rows of 16 codes, `pitch` bytes apart.

    A transposition in four rounds of interleaving halves.  like  int8, or int16: codes widened
    """
    def codegen(context, builder, signature, arguments):
        _, a, step, out, pitch = arguments
        number = lambda v: ir.Constant(I64, v)            # noqa: E731
        rows = [_load(builder, builder.add(a, builder.mul(step, number(i))), BYTES)
                for i in range(16)]
        for _ in range(4):
            pairs = [(rows[i], rows[i + 8]) for i in range(8)]
            rows = [builder.shuffle_vector(one, other, ir.Constant(
                ir.VectorType(I32, 16), [16 * (j % 2) + j // 2 + half for j in range(16)]))
                for one, other in pairs for half in (0, 8)]
        for c, row in enumerate(rows):
            row = builder.zext(row, ir.VectorType(I16, 16)) if like.dtype == types.int16 else row
            _store(builder, row, builder.add(out, builder.mul(pitch, number(c))))
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def fetch(typingctx, row):
    """Asks for an array's memory ahead; the core does so by itself, but not past a 4 kB page."""
    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        I8 = ir.IntType(8)
        start = builder.bitcast(array.data, I8.as_pointer())
        size = builder.mul(array.nitems, array.itemsize)
        f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(
            ir.VoidType(), [I8.as_pointer(), I32, I32, I32]), "llvm.prefetch.p0")
        lines = builder.udiv(builder.add(size, ir.Constant(I64, 63)), ir.Constant(I64, 64))
        with cgutils.for_range(builder, lines) as loop:
            line = builder.gep(start, [builder.mul(loop.index, ir.Constant(I64, 64))])
            builder.call(f, [line, *(ir.Constant(I32, v) for v in (0, 2, 1))])   # read, into L2
        return context.get_dummy_value()

    return types.void(row), codegen


def _load(builder, address, kind):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


@intrinsic
def steps(typingctx, fixed, code, noise):
    """(int32(fixed) + code + noise) >> 16 as uint8, noise uint16; numba alone uses 64 bits."""
    def codegen(context, builder, signature, arguments):
        fixed, code, noise = arguments
        total = builder.add(builder.add(builder.fptosi(fixed, I32), code), builder.zext(noise, I32))
        return builder.trunc(builder.ashr(total, ir.Constant(I32, 16)), ir.IntType(8))

    return types.uint8(types.float32, types.int32, types.uint16), codegen


@intrinsic
def ordered(typingctx, x):
    """An int32 that grows with the float32 x; outermost where x is not finite."""
    def codegen(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], I32)
        negative = builder.ashr(bits, ir.Constant(I32, 31))
        return builder.xor(bits, builder.and_(negative, ir.Constant(I32, 0x7FFFFFFF)))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, key):
    """The float32 whose `ordered` is key."""
    def codegen(context, builder, signature, arguments):
        negative = builder.ashr(arguments[0], ir.Constant(I32, 31))
        bits = builder.xor(arguments[0], builder.and_(negative, ir.Constant(I32, 0x7FFFFFFF)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen
