"""Which of the CPU's instructions the integer products use: asked once, said in the log.

    amx      tdpbusd       256 sums of 64 products u8 × s8   AMX: matrices of 16 rows (amx.py)
    vnni512  vpdpbusd zmm   16 sums of 4 products u8 × s8    AVX-512 VNNI
    vnni256  vpdpbusd ymm    8 sums of 4 products u8 × s8    AVX-VNNI, or AVX-512 VNNI with VL
    avx2     vpmaddwd ymm    8 sums of 2 products s16 × s16  any AVX2 (vpmaddubsw would saturate)
    numpy    nothing compiled: float32 BLAS and NumPy

All give the same integers. Float products of Identity operands take fused multiply-adds, the same
bits by 8 and by 16; by numpy they are summed in another order. Next: tiles.py.
"""
import ast
import ctypes
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from inspect import ismodule
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

try:
    import llvmlite.binding
    import numba
    from numba.core.codegen import get_host_cpu_features
except ImportError as error:
    numba, _missing = None, str(error)

_PROCESS = uuid4().hex[:8]
WORD = 4                                                  # bytes of contraction in one broadcast


class Isa(NamedTuple):
    """An instruction set: sums in a vector, how codes are stored, features (LLVM's names)."""

    name: str
    width: int                                            # int32 or float32 sums in a vector
    vectors: int                                          # side by side, of a row of a tile
    dtype: type                                           # of packed codes: int8, or int16
    features: tuple[tuple[str, ...], ...]                 # all of one of these

    @property
    def lanes(self) -> int:
        """Sums in a row of a tile."""
        return self.width * self.vectors

    @property
    def rows(self) -> int:
        """Rows of a tile. All its sums, and what is multiplied, stay in registers: 32 with AVX-512,
        else 16; AMX's own hold 16 rows."""
        if self.name == "amx":
            return 16
        return 8 if _features.get("avx512vl") or self.vectors == 1 else 4

    @property
    def tile(self) -> tuple[tuple, tuple]:
        """A tile's shape as tiles.panel takes it: rows, and vectors of a row; of AMX: matrices."""
        rows = ((0,) * self.rows,) if self.name == "amx" else (0,) * self.rows
        return rows, ((0,) * self.width,) * self.vectors

    @property
    def group(self) -> int:
        """Codes in a word: contraction terms of one instruction and sum."""
        return WORD // np.dtype(self.dtype).itemsize


ISAS = {isa.name: isa for isa in (
    Isa("amx", 16, 1, np.int8, (("amx-int8", "amx-tile"),)),
    Isa("vnni512", 16, 1, np.int8, (("avx512vnni", "avx512bw"),)),
    Isa("vnni256", 8, 2, np.int8, (("avxvnni",), ("avx512vnni", "avx512vl"))),
    Isa("avx2", 8, 2, np.int16, (("avx2",),)))}


def has(feature: str) -> bool:
    """Whether this CPU, or the one that numba was told to compile for, has what LLVM calls so."""
    return _features.get(feature, False)


def supported() -> list[str]:
    """Names of what this CPU has, the fastest first; "numpy", the last, is always there."""
    names = [isa.name for isa in ISAS.values()
             if any(all(_features.get(f) for f in some) for some in isa.features)]
    return [*names, "numpy"]


def set_instructions(name: str) -> None:
    """Use these instructions from now on; "auto": the fastest. They change speed and no integer.

    Float products of Identity operands are rounded otherwise by numpy, which adds in another order.

    Raises ValueError for a name that is unknown or that this CPU does not have.
    """
    global _chosen
    if name != "auto" and name not in supported():
        raise ValueError(f"instructions {name!r}: this machine has {', '.join(supported())}"
                         + (f" ({_missing})." if numba is None else "."))
    _chosen = supported()[0] if name == "auto" else name


def instructions() -> str:
    """The instructions in use: amx, vnni512, vnni256, avx2 or numpy."""
    return _chosen


def isa() -> Isa | None:
    """The instruction set of integer products; None: nothing is compiled."""
    return ISAS.get(_chosen)


def floats() -> Isa:
    """How float32 products are computed: fused multiply-adds of 8 numbers, of 16 with AVX-512.

    Narrower integer instructions than the CPU's own stand for an older CPU: 8.
    """
    wide = _features.get("avx512f") and _chosen == _fastest
    return Isa("fma", 16 if wide else 8, 1, np.float32, ())


def describe() -> str:
    """One line for the log: what is used, and why not more."""
    if numba is None:
        return f"NumPy and BLAS, for numba is not there ({_missing}): pip install numba"
    if _chosen == "numpy":
        return ("NumPy and BLAS, for this CPU has neither VNNI nor AVX2" if len(supported()) == 1
                else "NumPy and BLAS, as asked; this CPU has " + ", ".join(supported()[:-1]))
    return f"compiled kernels, integer dot products by {_chosen}"


def compiled(function, **options):
    """numba.njit without the GIL, machine code kept on disk until what it is made of changes.

    numba alone looks at the function's own file, and would keep code that calls an older tile. Two
    processes that compile at once write to files of their own: numba gives both the same name.
    """
    dispatcher = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    with suppress(AttributeError):                        # a numba that keeps it elsewhere
        file = dispatcher._cache._cache_file
        file._source_stamp = source_stamp(function.__module__)
        file._data_name_pattern = f"{file._index_name}.{_PROCESS}.{{number:d}}.nbc"
    return dispatcher


@cache
def source_stamp(module: str) -> str:
    """Hash of all that machine code of this module is made of.

    Its file, the files of this folder that it imports, directly or not, and the numbers that these
    import from elsewhere in minifqt. Functions from elsewhere are never compiled.
    """
    parts = [Path(sys.modules[module].__file__).read_bytes()]
    for node in ast.walk(ast.parse(parts[0])):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("minifqt."):
            for alias in node.names:
                value = getattr(sys.modules[node.module], alias.name)
                if ismodule(value):
                    parts.append(source_stamp(value.__name__).encode())
                elif node.module.startswith(__package__):
                    parts.append(source_stamp(node.module).encode())
                elif not callable(value):
                    parts.append(repr(value).encode())
    return sha256(b"".join(parts)).hexdigest()


def _matrices_allowed():
    """Whether Linux lets this process use AMX's registers, which must be asked for."""
    ask, request, registers = 158, 0x1023, 18             # arch_prctl, ARCH_REQ_XCOMP_PERM
    return sys.platform == "linux" and not ctypes.CDLL(None).syscall(ask, request, registers)


def _what_numba_compiles_for():
    """What LLVM calls the features of this CPU, or of the one that numba's variables name."""
    if numba is None:
        return {}
    name, given, host = numba.config.CPU_NAME, numba.config.CPU_FEATURES, llvmlite.binding
    another = given is not None and name not in (None, host.get_host_cpu_name())
    features = {} if another else dict(host.get_host_cpu_features())
    features |= {one[1:]: one[0] == "+" for one in (given or "").split(",") if one}
    if not features.get("avx512f"):                       # what builds on it goes with it
        features |= dict.fromkeys((one for one in features if one.startswith("avx512")), False)
    return features


_features = _what_numba_compiles_for()
if _features.get("avx512f") and numba.config.CPU_FEATURES is None:    # LLVM prefers 256 on Intel's
    numba.config.CPU_FEATURES = get_host_cpu_features() + ",-prefer-256-bit"
_features["amx-int8"] = _features.get("amx-int8", False) and _matrices_allowed()
_chosen = _fastest = supported()[0]
