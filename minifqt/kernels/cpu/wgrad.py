"""Integer sums of a weight gradient, compiled: images of a task are packed, taps move over them.

No columns are formed either: x lies as rows of channels, so that a tap is a distance in memory, and
g as words of a few pixels. Of floats: floats.py. Who calls, and with what: products.py.
"""
import numpy as np

from minifqt.kernels.cpu.amx import HEIGHT, configure
from minifqt.kernels.cpu.board import add, leave, seat, take
from minifqt.kernels.cpu.choice import WORD, compiled
from minifqt.kernels.cpu.sums import place
from minifqt.kernels.cpu.tiles import LINE, lanes_of, lined, panel, rows_of, turn16, words16

NEAR = 40_000                                             # bytes that all taps read in turn: L1


@compiled
def wgrad_images(counter, kind, rows, vectors, g, flip_g, x, flip_x, offset, stride, taps, sizes,
                 total, x1, g1, done, present, ends, dw):
    """dw (K, R, S, C): Σ g·x, Σ x and Σ g over images and pixels, in parts, then their epilogue.

    g (N, P, Q, K), x (N, H, W, C), moved to the signed and to the unsigned side by their flips
    kind   whose dtype is that of packed x;  sizes, present  as in `wgrad_plan`
    total  (threads, R, S, C', K') Σ g·x, x1 (threads, R, S, C) Σ x, not yet set; C', K' are
           multiples of 16;  g1 (threads, P, Q, K) Σ of g moved to 0..255, empty if not needed
    done   (1 + threads,) tasks that are done: in all, by each thread
    """
    me = seat(counter)
    if me < 0:
        return
    (N, P, Q, K), C, (R, S), (images, strip, quads, pitch) = g.shape, x.shape[3], taps, sizes
    (room, padded), tall, size = total.shape[3:], (strip - 1) * stride + R, kind.itemsize
    group, width, strips = WORD // size, lanes_of(vectors), (P + strip - 1) // strip
    wide, deep = (pitch + 15) // 16 * 16, (tall - 1) // stride + 1
    line = ((deep * pitch + wide + S) * size // LINE + 1 | 1) * LINE  # odd: apart in cache
    tasks, mine = (N + images - 1) // images * strips, total[me].reshape(-1)
    codes = lined((tall * pitch + 16) * stride * C + 16, g)             # read past its end
    image = codes[:tall * pitch * stride * C].reshape(tall, pitch * stride, C)
    spots = np.empty((strip, quads * group, padded), np.uint8)
    left = lined(images * stride * stride * room * line // size, kind)
    left = left.reshape(images, stride, stride, room, line // size)
    down = pitch // group                                 # words from row to row
    right = lined(images * strip * down * padded * WORD, g).view(np.uint32)
    right = right.reshape(images, strip, down, padded)
    right[:] = 0
    near = max(1, NEAR // (stride * stride * room * line + strip * down * padded * WORD))
    sums = lined(total[0].size * WORD, g).view(np.int32).reshape(total.shape[1:])
    seen_x = np.empty(image.shape, np.uint16)             # ≤ IMAGES · 255, as seen_g
    seen_g = np.empty((strip if g1.size else 0, Q, K), np.uint16)
    flat, zero, joined = sums.reshape(-1), np.int64(0), rows_of(rows) == HEIGHT
    while True:
        task = take(counter)
        if task >= tasks:
            break
        if done[1 + me] == 0:
            for part in (mine, x1[me].reshape(-1), g1[me:me + 1].reshape(-1)):
                for i in range(len(part)):
                    part[i] = 0
        seen_x[:], seen_g[:], sums[:] = 0, 0, 0
        start, top = task // strips * images, task % strips * strip
        height, count = min(strip, P - top), min(images, N - start)
        for n in range(count):
            # x as rows of channels, for each phase of the stride; g as words of a few pixels
            place(image, x[start + n], flip_x, top * stride, offset)
            add_codes(image, 0, seen_x)
            for y in range(tall):
                for phase in range(stride):
                    for q in range(0, wide, 16):          # past its end: the next row comes
                        a = image.ctypes.data + (y * image.shape[1] + q * stride + phase) * C
                        b = left[n, y % stride, phase].ctypes.data
                        b += (y // stride * pitch + q) * size
                        for c in range(0, room, 16):      # codes past the last channel: unused
                            turn16(left, a + c, stride * C, b + c * line, line)
            if g1.size:
                add_codes(g[start + n, top:top + height], 128 ^ flip_g, seen_g[:height])
            place(spots, g[start + n], flip_g, top, (zero, zero))
            for p in range(height):
                for quad in range(quads):
                    a = spots[p].ctypes.data + quad * group * padded
                    b = right[n, p, quad].ctypes.data
                    for k in range(0, padded, 16):
                        words16(left, a + k, padded, b + k * WORD)
        # AMX wants long contractions: all rows of pixels as one, with zeros of g between
        lines, words = (1, (height - 1) * down + quads) if joined else (height, quads)
        configure(rows, C, words)
        for n in range(0, count, near):
            for r in range(R):
                for s in range(min(S, stride)):           # a tap moves x by the size of a code
                    a = left[n, r % stride, s].ctypes.data + r // stride * pitch * size
                    panel(rows, vectors, left,
                          (a, line, C, size, (S - s + stride - 1) // stride),
                          (right[n].ctypes.data, width * WORD, padded // width),
                          (sums[r, s].ctypes.data, padded, stride * room * padded),
                          ((min(near, count - n), stride * stride * room * line,
                            strip * down * padded * WORD),
                           (lines, pitch * size, down * padded * WORD),
                           (words, WORD, padded * WORD)), (0,))
        add_taps(seen_x, x1[me], stride, height, Q)
        if g1.size:
            add_codes(seen_g[:height], 0, g1[me, top:top + height])
        for i in range(len(flat)):                        # int32 holds the sums of one task
            mine[i] += flat[i]
        done[1 + me] += 1
        if add(done.ctypes.data, 0, 1) == tasks - 1:      # nobody else is at work any more
            finish_wgrad(total, x1, g1, done[1:], N, flip_g, flip_x, present, ends, dw)
    leave(counter, me)


@compiled
def add_codes(codes, flip, total):
    """total += codes ^ flip, element by element."""
    for y in range(codes.shape[0]):
        source, target = codes[y].reshape(-1), total[y].reshape(-1)
        for i in range(source.size):
            target[i] += source[i] ^ np.uint8(flip)


@compiled
def add_taps(image, x1, stride, height, Q):
    """x1[r, s, c] += Σ over output pixels of what tap (r, s) reads.  image (tall, wide, C)."""
    R, S, C = x1.shape
    total = np.empty(image[0].size, np.uint32)
    for r in range(R):
        total[:] = 0
        for p in range(height):                           # long rows innermost
            row = image[r + p * stride].reshape(-1)
            for i in range(len(row)):
                total[i] += row[i]
        for s in range(S):
            for q in range(Q):
                pixel = total[(s + q * stride) * C:]
                for c in range(C):
                    x1[r, s, c] += pixel[c]


@compiled
def for_each(one, count):
    """A number, or one a channel, in float64 for each of so many channels."""
    out = np.empty(count)
    for i in range(count):
        out[i] = one[i % len(one)]
    return out


@compiled
def finish_wgrad(total, x1, g1, tasks, N, flip_g, flip_x, present, ends, out):
    """out (K, R, S, C) = reference.epilogue of the integer sums of those threads that had tasks.

    total .. g1  as in wgrad.wgrad_images, of codes moved by the flips; tasks (threads,)
    present      the first pixel that meets a tap, and the last + 1, of N images: (R, 2), (S, 2)
    ends         zeros of g and x, scales of g and x, one or one a channel
    """
    (K, R, S, C), moved_g, moved_x = out.shape, np.int64(flip_g), -np.int64(flip_x)
    zero_g, zero_x = for_each(ends[0], K), for_each(ends[1], C)
    scale_g, scale_x = for_each(ends[2], K), for_each(ends[3], C)
    both, gs, row = np.empty(K, np.int64), np.empty(K, np.int64), np.empty(K, np.float32)
    for r in range(R):
        for s in range(S):
            (top, bottom), (left, right) = present[0][r], present[1][s]
            pixels = N * (bottom - top) * (right - left)
            gs[:] = -128 * pixels if len(g1) else 0
            for t in range(len(g1)):
                for p in range(top, bottom if tasks[t] else top):
                    for q in range(left, right):
                        for k in range(K):
                            gs[k] += g1[t, p, q, k]
            for c in range(C):
                xs, both[:] = np.int64(0), 0
                for t in range(len(total)):
                    if tasks[t]:
                        xs += x1[t, r, s, c]
                        part = total[t, r, s, c]
                        for k in range(K):
                            both[k] += part[k]
                centred = moved_g * xs + moved_g * moved_x * pixels
                b1, zero, scale = np.float64(xs + moved_x * pixels), zero_x[c], scale_x[c]
                for k in range(K):
                    y = np.float64(both[k] + (centred + moved_x * gs[k])) - zero_g[k] * b1
                    y = y - zero * np.float64(gs[k] + moved_g * pixels)
                    row[k] = (y + (zero_g[k] * zero) * np.float64(pixels)) * (scale_g[k] * scale)
                for k in range(K):
                    out[k, r, s, c] = row[k]
