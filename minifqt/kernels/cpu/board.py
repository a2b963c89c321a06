"""What a kernel and the threads that share it say to each other, compiled: seats, tasks, the board.

A kernel begins with `me = seat(counter)` and returns at once if that is negative, takes its tasks
by `take(counter)` and ends with `leave(counter, me)`. Asked for, `seat` posts the call itself on
the board: where its machine code is, and its arguments. Other threads, which `serve` the board,
make the same call. No Python is involved, and no lock. Who posts what: team.py.
"""
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minifqt.kernels.cpu.choice import compiled

# What a counter (WORDS,) int64 holds: tasks taken, seats taken, the last seat, whether more threads
# may come, how many are there, the addresses of the kernel and of its arguments, which post is
# asked of the kernel, and the address of what is shared before it (0: nothing is).
TAKEN, SEATED, LAST, OPEN, INSIDE, CODE, ARGUMENTS, POST, FRONT = range(9)
WORDS, ROOM = 16, 4096                                    # two cache lines; bytes of arguments
SHARED, BEGUN = 1, 2                                      # posts: and work on it; and return
I64, BYTES = ir.IntType(64), ir.IntType(8).as_pointer()


def _cell(builder, address, word):
    counter = builder.inttoptr(address, I64.as_pointer())
    return builder.gep(counter, [ir.Constant(I64, word) if isinstance(word, int) else word])


@intrinsic
def read(typingctx, address, word):
    """This word of the counter at this address."""
    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        return builder.load_atomic(_cell(builder, *arguments), "seq_cst", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def write(typingctx, address, word, value):
    """Sets this word, after all that was written before."""
    def codegen(context, builder, signature, arguments):
        builder.store_atomic(arguments[2], _cell(builder, *arguments[:2]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add(typingctx, address, word, count):
    """Adds to this word and returns what it was before: no two threads get the same."""
    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        return builder.atomic_rmw("add", _cell(builder, *arguments[:2]), arguments[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def call(typingctx, code, arguments):
    """code(arguments), as `seat` posts them."""
    def codegen(context, builder, signature, arguments):
        code, given = arguments
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(code, kind.as_pointer()), [given])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tells the core that this thread is only waiting."""
    def codegen(context, builder, signature, arguments):  # noqa: ARG001 - numba's signature
        kind = ir.FunctionType(ir.VoidType(), [])
        f = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
        builder.call(f, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def seat(typingctx, counter):
    """Which of the threads this is, for scratch of its own; negative if it is not to work.

    Asked to post, it writes this call on the board: the kernel is the function that is being
    compiled, and its arguments are still as they came.
    """
    def codegen(context, builder, signature, arguments):
        counter = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.ptrtoint(counter.data, I64)
        cell = [_cell(builder, address, word) for word in range(WORDS)]
        zero, mine = ir.Constant(I64, 0), cgutils.alloca_once(builder, I64)
        asked = builder.load(cell[POST])
        with builder.if_else(builder.icmp_signed("!=", asked, zero)) as (posting, sitting):
            with posting:
                shared = builder.icmp_signed("==", asked, ir.Constant(I64, SHARED))
                builder.store(_post(context, builder, builder.load(cell[ARGUMENTS])), cell[CODE])
                builder.store(zero, cell[TAKEN])
                builder.store(builder.zext(shared, I64), cell[SEATED])
                builder.store(zero, cell[POST])
                builder.store_atomic(ir.Constant(I64, 1), cell[OPEN], "seq_cst", 8)
                builder.store(builder.select(shared, zero, ir.Constant(I64, -1)), mine)
            with sitting:
                place = builder.atomic_rmw("add", cell[SEATED], ir.Constant(I64, 1), "seq_cst")
                there = builder.icmp_signed("<=", place, builder.load(cell[LAST]))
                builder.store(builder.select(there, place, ir.Constant(I64, -1)), mine)
        return builder.load(mine)

    return types.int64(counter), codegen


def _post(context, builder, room):
    """Writes the kernel's arguments to this address; the address of what calls it with them.

    Arrays without their owners, which numba lets go when the call that posts returns: an array
    comes as owner, parent, count, size of a number, data, shape, strides.
    """
    kernel, inside = builder.function, ir.IRBuilder()
    given, unread = list(kernel.args[2:]), kernel.args[:2]        # numba's: result, exception
    kinds = [value.type for value in given]
    for i in range(len(given) - 2):
        if kinds[i:i + 3] == [BYTES, BYTES, I64]:
            given[i] = ir.Constant(BYTES, None)
    packed = ir.LiteralStructType(kinds)
    if context.get_abi_sizeof(packed) > ROOM:
        raise NotImplementedError(f"{kernel.name}: more arguments than a room holds.")
    for i, value in enumerate(given):
        builder.store(value, _field(builder, room, packed, i))
    posted = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64]),
                         kernel.name + ".posted")
    posted.linkage = "internal"
    inside.position_at_end(posted.append_basic_block())
    kernel.attributes.add("noinline")                     # or all of it would be compiled twice
    inside.call(kernel, [inside.bitcast(inside.alloca(I64, 4), value.type) for value in unread]
                + [inside.load(_field(inside, posted.args[0], packed, i))
                   for i in range(len(given))])
    inside.ret_void()
    return builder.ptrtoint(posted, I64)


def _field(builder, address, struct, i):
    place = [ir.Constant(ir.IntType(32), n) for n in (0, i)]
    return builder.gep(builder.inttoptr(address, struct.as_pointer()), place)


@compiled
def visit(at):
    """Helps with what this counter posted; it is not closed while somebody is inside."""
    add(at, INSIDE, 1)
    if read(at, OPEN):
        call(read(at, CODE), read(at, ARGUMENTS))
    add(at, INSIDE, -1)


@compiled
def take(counter):
    """The next task, for one thread alone; what is shared is helped with before."""
    front = counter[FRONT]
    if front and read(front, OPEN):
        visit(front)
    return add(counter.ctypes.data, TAKEN, 1)


@compiled
def leave(counter, me):
    """There is no more to take; who shared this waits for those who came."""
    at = counter.ctypes.data
    write(at, OPEN, 0)
    if me == 0 and counter[FRONT] == 0:
        while read(at, INSIDE):
            pause()


@compiled
def dismiss(counter):
    """Nobody comes any more, and who came has left."""
    at = counter.ctypes.data
    write(at, OPEN, 0)
    while read(at, INSIDE):
        pause()


@compiled
def serve(board, me, patience):
    """Works on what is posted on the board, what is shared first, until long nothing is."""
    idle = 0
    while idle < patience:
        idle += 1
        for place in range(len(board)):
            at = board[place].ctypes.data
            if read(at, OPEN) and me <= board[place, LAST]:
                visit(at)
                idle = 0
                break
        pause()
