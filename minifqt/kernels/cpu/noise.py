"""NumPy's Philox, made where it is used: the same bits as rng.philox, two ways at once.

A core has one multiplier for 64-bit numbers and others for vectors of them; both work at the same
time where instructions of the two kinds lie side by side. While two rounds of eight blocks run in
vectors, a ninth runs all its ten in ordinary registers. Next: codes.py.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minifqt.kernels.cpu.choice import compiled
from minifqt.rng import INCREMENTS, MULTIPLIERS

WIDE = 8                                                  # blocks of a vector
TURN = WIDE + 5                                           # blocks of five turns of two rounds
CHUNK = 16 * 10 * TURN                                    # elements from one buffer of noise
BLOCKS = CHUNK // 16 + 1                                  # of Philox, 16 values each
W0, W1 = (np.uint64(v) for v in INCREMENTS)
I64, I128 = ir.IntType(64), ir.IntType(128)
VECTOR = ir.VectorType(I64, WIDE)


def _rounds(builder, c, keys, count, product, spread):
    """IR of rounds on four words c; keys is an address; spread turns a key into the words' type."""
    for r in range(count):
        (h0, l0), (h1, l1) = product(c[0], MULTIPLIERS[0]), product(c[2], MULTIPLIERS[1])
        k0, k1 = (spread(builder.load(_at(builder, keys, 2 * r + i, I64))) for i in (0, 1))
        c = [builder.xor(builder.xor(h1, c[1]), k0), l1,
             builder.xor(builder.xor(h0, c[3]), k1), l0]
    return c


def _at(builder, address, word, kind):
    place = builder.add(address, ir.Constant(I64, 8 * word))
    return builder.inttoptr(place, kind.as_pointer())


@intrinsic
def whole_block(typingctx, counter, step, keys, out):
    """All rounds of one block; keys of all rounds and four words out by address."""
    def codegen(context, builder, signature, arguments):
        counter, step, keys, out = arguments

        def product(a, m):
            both = builder.mul(builder.zext(a, I128), ir.Constant(I128, m))
            high = builder.lshr(both, ir.Constant(I128, 64))
            return builder.trunc(high, I64), builder.trunc(both, I64)

        c = [counter, step, ir.Constant(I64, 0), ir.Constant(I64, 0)]
        for i, word in enumerate(_rounds(builder, c, keys, 10, product, lambda key: key)):
            builder.store(word, _at(builder, out, i, I64))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.intp, types.intp), codegen


@intrinsic
def two_rounds(typingctx, words, pitch, keys):
    """Two rounds of WIDE blocks, whose words 0 .. 3 lie `pitch` bytes apart; all by address."""
    def codegen(context, builder, signature, arguments):
        words, pitch, keys = arguments
        half, low_half = (ir.Constant(VECTOR, [v] * WIDE) for v in (32, 2**32 - 1))

        def product(a, m):                                # by halves: no vector product is 128 bits
            low, high = (ir.Constant(VECTOR, [v] * WIDE) for v in (m & 2**32 - 1, m >> 32))
            first, second = builder.and_(a, low_half), builder.lshr(a, half)
            t = builder.add(builder.mul(first, high),
                            builder.lshr(builder.mul(first, low), half))
            u = builder.add(builder.mul(second, low), builder.and_(t, low_half))
            top = builder.add(builder.mul(second, high), builder.lshr(t, half))
            return (builder.add(top, builder.lshr(u, half)),
                    builder.mul(a, ir.Constant(VECTOR, [m] * WIDE)))

        def spread(key):
            nothing, zero = ir.Constant(VECTOR, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            one = builder.insert_element(nothing, key, zero)
            return builder.shuffle_vector(
                one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), WIDE), [0] * WIDE))

        rows = [builder.inttoptr(builder.add(words, builder.mul(pitch, ir.Constant(I64, i))),
                                 VECTOR.as_pointer()) for i in range(4)]
        c = [builder.load(row) for row in rows]
        for word in c:
            word.align = 8
        for row, word in zip(rows, _rounds(builder, c, keys, 2, product, spread), strict=True):
            builder.store(word, row).align = 8
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@compiled
def philox_blocks(key, step, first, count, state, words):
    """words[:4 · count] = blocks first .. of rng.philox; count ≤ BLOCKS.  state (4, BLOCKS)."""
    keys, k0, k1 = np.empty(20, np.uint64), key[0], key[1]
    for r in range(10):
        keys[2 * r], keys[2 * r + 1] = k0, k1
        k0 += W0
        k1 += W1
    side = count // TURN * WIDE                           # blocks side by side in vectors
    done, pitch = side, state.strides[0]
    c0, c1, c2, c3 = state[0], state[1], state[2], state[3]
    for i in range(side):
        c0[i], c1[i], c2[i], c3[i] = first + i + 1, step, 0, 0
    for turn in range(5):
        for i in range(0, side, WIDE):
            two_rounds(state.ctypes.data + 8 * i, pitch, keys.ctypes.data + 32 * turn)
            whole_block(np.uint64(first + done + 1), np.uint64(step), keys.ctypes.data,
                        words.ctypes.data + 32 * done)
            done += 1
    while done < count:
        whole_block(np.uint64(first + done + 1), np.uint64(step), keys.ctypes.data,
                    words.ctypes.data + 32 * done)
        done += 1
    for i in range(side):
        words[4 * i], words[4 * i + 1] = c0[i], c1[i]
        words[4 * i + 2], words[4 * i + 3] = c2[i], c3[i]


@compiled
def noise_of(key, step, first, count, constant, state, words):
    """The 16-bit noise of elements first .. first + count − 1, in a buffer; constant −1: random."""
    noise = words.view(np.uint16)
    if constant >= 0:
        noise[:count] = constant
        return noise[:count]
    skip = first % 16
    philox_blocks(key, step, first // 16, (skip + count + 15) // 16, state, words)
    return noise[skip:skip + count]
