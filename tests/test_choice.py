"""The CPU's instructions: chosen by name, never needed; compiled anew when their source changes."""
import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import tiny

import minifqt
import models
from minifqt import rng
from minifqt.kernels import reference
from minifqt.kernels.cpu import choice

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "minifqt/kernels/cpu").glob("[a-z]*.py"))
FROM_TILES = {"codes", "floats", "householder", "mixing", "norms", "packing", "products", "scales",
              "sums", "tiles", "wgrad"}
FROM_NOISE = FROM_TILES - {"packing", "tiles"} | {"noise"}
FROM_SCALES = {"scales", "householder", "mixing", "sums", "wgrad", "floats", "products"}


@pytest.mark.parametrize("name", ["avx512", "", "AVX2"])
def test_unknown_instructions_raise_and_change_nothing(name, set_instructions):
    before = choice.instructions()
    with pytest.raises(ValueError, match=rf"instructions '{name}': this machine has .*numpy"):
        set_instructions(name)
    assert choice.instructions() == before


def test_instructions_that_this_cpu_lacks_raise(set_instructions, monkeypatch):
    monkeypatch.setattr(choice, "supported", lambda: ["vnni256", "numpy"])
    with pytest.raises(ValueError, match="instructions 'avx2': this machine has vnni256, numpy"):
        set_instructions("avx2")


@pytest.mark.parametrize(("features", "expected"), [
    ({}, ["numpy"]),
    ({"avx2"}, ["avx2", "numpy"]),
    ({"avx2", "avxvnni"}, ["vnni256", "avx2", "numpy"]),
    ({"avx2", "avx512f", "avx512bw", "avx512vl"}, ["avx2", "numpy"]),
    ({"avx2", "avx512vnni"}, ["avx2", "numpy"]),
    ({"avx2", "avx512vnni", "avx512vl"}, ["vnni256", "avx2", "numpy"]),
    ({"avx2", "avx512vnni", "avx512bw"}, ["vnni512", "avx2", "numpy"]),
    ({"avx2", "amx-int8"}, ["avx2", "numpy"]),
    ({"avx2", "amx-tile", "amx-int8"}, ["amx", "avx2", "numpy"])])
def test_what_is_supported_follows_from_the_cpus_features(features, expected, monkeypatch):
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    monkeypatch.setattr(choice, "_features", dict.fromkeys(features, True))
    assert choice.supported() == expected


def test_amx_is_asked_for_where_it_is_and_only_on_linux(monkeypatch):
    if "amx" in choice.supported():
        assert choice._matrices_allowed()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not choice._matrices_allowed()


@pytest.mark.parametrize("given", [None, "+sse2"])
def test_loops_take_512_bits_unless_numba_was_told_otherwise(given):
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    code = ("from minifqt.kernels.cpu import choice; import numba; "
            "print(bool(choice._features.get('avx512f')), numba.config.CPU_FEATURES)")
    rest = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=rest | ({"NUMBA_CPU_FEATURES": given} if given else {}), cwd=ROOT)
    wide, found = done.stdout.split()
    if given or wide == "False":
        assert found == str(given)
    else:
        assert found.endswith(",-prefer-256-bit")


@pytest.mark.parametrize(("name", "features", "fastest"), [
    ("haswell", "+avx2,+fma", "avx2"), ("x86-64", "+sse2", "numpy"),
    (None, "-avx512f,-amx-tile,-avxvnni", "avx2")])
def test_kernels_are_for_the_cpu_that_numba_is_told_to_compile_for(name, features, fastest):
    """LLVM ends the process at an instruction that this CPU does not have."""
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    if "avx2" not in choice.supported():
        pytest.skip("this CPU has no AVX2")
    code = ("import sys; sys.path.insert(0, 'tests'); import test_choice; "
            "from minifqt.kernels.cpu import choice; "
            "print(choice.instructions(), choice.has('avx512ifma')); "
            + "print(test_choice.two_steps(True))" * (name == "haswell"))
    told = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {key: v for key, v in told.items() if v}, cwd=ROOT)
    found, *losses = done.stdout.splitlines()
    assert found == f"{fastest} False"
    assert losses == [str(two_steps(True))] * (name == "haswell")


def test_auto_is_the_fastest(set_instructions):
    set_instructions("numpy")
    assert choice.instructions() == "numpy"
    assert choice.isa() is None
    set_instructions("auto")
    assert choice.instructions() == choice.supported()[0]


def test_one_line_says_what_is_used_and_why(set_instructions, monkeypatch):
    set_instructions("numpy")
    monkeypatch.setattr(choice, "numba", "there")
    monkeypatch.setattr(choice, "supported", lambda: ["avx2", "numpy"])
    assert choice.describe() == "NumPy and BLAS, as asked; this CPU has avx2"
    set_instructions("avx2")
    assert choice.describe() == "compiled kernels, integer dot products by avx2"
    monkeypatch.setattr(choice, "supported", lambda: ["numpy"])
    set_instructions("auto")
    assert choice.describe() == "NumPy and BLAS, for this CPU has neither VNNI nor AVX2"


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
sys.path[:0] = [{root!r}, {tests!r}]
import minifqt, test_choice, train
from minifqt.kernels.cpu import choice
print(choice.describe())
for fused in (False, True):
    print(test_choice.two_steps(fused))
"""


def two_steps(fused):
    """Losses of two steps on digits."""
    train_set, _ = tiny.digits(16)
    x, labels = train_set.images.astype("float32") / 255, train_set.labels
    net, optimizer = models.build("resnet8", 10, "bhq5", seed=1, channels=1), minifqt.SGD()
    net = minifqt.fuse(net) if fused else net
    return [float(minifqt.train_step(net, optimizer, x, labels, 0.05, t)) for t in range(2)]


def test_without_numba_everything_works_and_says_what_to_install(set_instructions):
    script = WITHOUT_NUMBA.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    said, plain, fused = done.stdout.splitlines()
    assert said.startswith("NumPy and BLAS, for numba is not there (")
    assert said.endswith("): pip install numba")
    set_instructions("numpy")
    expected = str(two_steps(False))
    assert plain == fused == expected


def stamps():
    """The stamp of each file of kernels/cpu, by its name."""
    choice.source_stamp.cache_clear()
    try:
        return {name: choice.source_stamp(import_module(f"minifqt.kernels.cpu.{name}").__name__)
                for name in KERNELS}
    finally:
        choice.source_stamp.cache_clear()


@pytest.mark.parametrize(("edited", "stale"), [
    ("choice", set(KERNELS) - {"amx"}), ("amx", {"amx", *FROM_TILES}), ("tiles", FROM_TILES),
    ("noise", FROM_NOISE),
    ("wgrad", {"products", "wgrad"}), ("scales", FROM_SCALES),
    ("products", {"products"})])
def test_an_edit_makes_stale_what_imports_the_file_and_nothing_else(edited, stale, monkeypatch):
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    before, read = stamps(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes",
                        lambda path: read(path) + b"#" * (path.stem == edited))
    after = stamps()
    assert {name for name in KERNELS if after[name] != before[name]} == stale


@pytest.mark.parametrize(("module", "name", "value", "stale"), [
    (reference, "UNIT", 32768, FROM_SCALES),
    (rng, "INCREMENTS", rng.MULTIPLIERS, FROM_NOISE)])
def test_another_number_from_elsewhere_makes_stale_what_is_compiled_with_it(
        module, name, value, stale, monkeypatch):
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    before = stamps()
    monkeypatch.setattr(module, name, value)
    after = stamps()
    assert {name for name in KERNELS if after[name] != before[name]} == stale


def test_every_compiled_function_is_kept_under_the_stamp_of_its_module():
    numba = pytest.importorskip("numba", reason="compiled kernels: pip install numba")
    for name in KERNELS:
        module = import_module(f"minifqt.kernels.cpu.{name}")
        for value in vars(module).values():
            if isinstance(value, numba.core.dispatcher.Dispatcher):
                assert value._cache._cache_file._source_stamp == choice.source_stamp(
                    value.py_func.__module__)


def test_what_source_stamp_does_not_follow_is_not_written():
    """Compiled functions outside the folder; within it imports of another form, or of arrays."""
    pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
    for path in (ROOT / "minifqt").glob("**/*.py"):
        inside = path.parent.name == "cpu"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    assert top not in (("minifqt",) if inside else ("numba", "llvmlite")), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                assert inside or node.module.partition(".")[0] not in ("numba", "llvmlite"), path
                for alias in node.names if inside and node.module.startswith("minifqt") else ():
                    value = getattr(import_module(node.module), alias.name)
                    assert callable(value) or isinstance(value, int | float | tuple | ModuleType)
