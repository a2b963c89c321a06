"""AMX: eight registers that are matrices, of 16 rows of 64 bytes, and the product u8 × s8 of two.

How large they are is set before (`configure`), after each task that a kernel takes: in `take` it
may have helped another kernel. Intel, Software Developer's Manual, volume 1, chapter 18. Next:
tiles.py.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HEIGHT, DEPTH = 16, 16                                    # rows, and words of a row
SUMS, LEFT, RIGHT = 0, (4, 5), (6, 7)                     # registers: 2 × 2; of 16 words, of fewer
I8, I16, I64 = (ir.IntType(bits) for bits in (8, 16, 64))


def is_matrix(rows):
    """Whether a tile of these rows, a numba type, is a register of AMX."""
    return isinstance(rows.dtype, types.BaseTuple)


@intrinsic
def configure(typingctx, rows, count, words):
    """Sets the registers for panels of so many rows, contracted over so many words at a time.

    Rows are shared out evenly; what is left of the words behind the last 16 has registers of its
    own. Does nothing for tiles of other instructions.
    """
    matrix = is_matrix(rows)

    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        if not matrix:
            return context.get_dummy_value()
        _, count, words = arguments
        place, zeros = cgutils.alloca_once(builder, I8, 64), ir.VectorType(I64, 8)
        whole = builder.bitcast(place, zeros.as_pointer())
        builder.store(ir.Constant(zeros, [0] * 8), whole).align = 1
        rest = builder.and_(words, _number(DEPTH - 1))
        rest = builder.select(builder.icmp_signed("==", rest, _number(0)), _number(DEPTH), rest)
        height = _height(builder, count)[0]

        def put(at, value, kind):
            where = builder.gep(place, [_number(at)])
            builder.store(builder.trunc(value, kind), builder.bitcast(where, kind.as_pointer()))

        put(0, _number(1), I8)                            # palette
        for t in range(8):
            columns, tall = _number(64), height
            if t == LEFT[1]:
                columns = builder.mul(rest, _number(4))
            if t in RIGHT:
                tall = rest if t == RIGHT[1] else _number(DEPTH)
            put(16 + 2 * t, columns, I16)
            put(48 + t, tall, I8)
        _call(builder, "ldtilecfg", place)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp), codegen


def panel(builder, a, b, c, loops, add):
    """IR of tiles.panel: two matrices of rows by two of sums at a time.

    Two of a group of rows, or, where each group is one matrix, two groups.
    """
    (a, a_row, count, a_group, groups), (b, b_block, blocks), (c, pitch, c_group) = a, b, c
    height, down = _height(builder, count)
    across, c_group = builder.mul(pitch, _number(4)), builder.mul(c_group, _number(4))
    single = builder.icmp_signed("==", down, _number(1))
    number, outer, a_step, c_step = (builder.select(single, *either) for either in (
        (groups, down), (_number(1), groups), (a_group, builder.mul(a_row, height)),
        (c_group, builder.mul(across, height))))

    def pairs(number, body):
        """body(first, 2) for two at a time, and body(last, 1) for an odd one."""
        with cgutils.for_range(builder, builder.lshr(number, _number(1))) as loop:
            body(builder.shl(loop.index, _number(1)), 2)
        with builder.if_then(builder.trunc(number, ir.IntType(1))):
            body(builder.sub(number, _number(1)), 1)

    def at(start, step, first, count):
        return [builder.add(start, builder.mul(step, builder.add(first, _number(i))))
                for i in range(count)]

    def blocks_of(k, v):
        right, column = at(b, b_block, k, v), builder.mul(k, _number(64))
        with cgutils.for_range(builder, outer) as loop:
            first = builder.add(a, builder.mul(a_group, loop.index))
            place = builder.add(c, builder.add(builder.mul(c_group, loop.index), column))
            pairs(number, lambda i, m: _product(
                builder, at(first, a_step, i, m), a_row, right, at(place, c_step, i, m), across,
                loops, add))

    pairs(blocks, blocks_of)


def _product(builder, left, a_row, right, sums, c_row, loops, add):
    """Matrices of sums, of each left matrix with each right one: addresses, bytes between rows."""
    outer, inner, (words, _, b_row) = loops
    m, v = len(left), len(right)

    def place(i, j):
        return builder.add(sums[i], _number(64 * j))

    def dots(moved, rest):
        a_moved, b_moved = moved
        A, B, last = LEFT[rest], RIGHT[rest], None
        for i in range(m):
            _load(builder, A, builder.add(left[i], a_moved), a_row)
            for j in range(v) if i == 0 else reversed(range(v)):
                if j != last:
                    _load(builder, B, builder.add(right[j], b_moved), b_row)
                    last = j
                _call(builder, "tdpbusd", *map(_register, (SUMS + 2 * i + j, A, B)))

    for i in range(m):
        for j in range(v):
            if add:
                _load(builder, SUMS + 2 * i + j, place(i, j), c_row)
            else:
                _call(builder, "tilezero", _register(SUMS + 2 * i + j))
    whole = builder.lshr(words, _number(4))
    steps = _number(4 * DEPTH), builder.mul(b_row, _number(DEPTH))
    with cgutils.for_range(builder, outer[0]) as n, cgutils.for_range(builder, inner[0]) as r:
        start = [builder.add(builder.mul(outer[side], n.index), builder.mul(inner[side], r.index))
                 for side in (1, 2)]

        def moved(k):
            return [builder.add(first, builder.mul(step, k))
                    for first, step in zip(start, steps, strict=True)]

        with cgutils.for_range(builder, whole) as k:
            dots(moved(k.index), 0)
        rest = builder.and_(words, _number(DEPTH - 1))
        with builder.if_then(builder.icmp_signed("!=", rest, _number(0))):
            dots(moved(whole), 1)
    for i in range(m):
        for j in range(v):
            _call(builder, "tilestored64", _register(SUMS + 2 * i + j), _pointer(
                builder, place(i, j)), c_row)


def _height(builder, count):
    """Rows of a matrix, and how many matrices: `count` rows shared out evenly."""
    down = builder.lshr(builder.add(count, _number(HEIGHT - 1)), _number(4))
    return builder.udiv(builder.sub(builder.add(count, down), _number(1)), down), down


def _load(builder, t, address, step):
    _call(builder, "tileloadd64", _register(t), _pointer(builder, address), step)


def _call(builder, name, *arguments):
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86." + name),
                 arguments)


def _pointer(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


def _register(t):
    return ir.Constant(I8, t)


def _number(v):
    return ir.Constant(I64, v)
