"""What a linter cannot see: the direction of imports, the reader's path, documented flags."""
import ast
import re
from pathlib import Path

import numpy as np
import pytest
from mutants import parse

import models
import train
from minifqt import quantizers

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("minifqt/**/*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("data/*.py"),
                  ROOT / "train.py"])
# a module may import what stands to its left
ORDER = ["minifqt.backend", "minifqt.rng", "minifqt.qtensor", "minifqt.kernels",
         "minifqt.quantizers", "minifqt.recipes", "minifqt.layers", "minifqt.fusion",
         "minifqt.ahead", "minifqt.losses", "minifqt.optim", "minifqt.checkpoint",
         "minifqt.training", "minifqt.run", "minifqt.study.probe", "minifqt.study.terms",
         "minifqt.study.variance", "minifqt.autobits", "minifqt.study"]
PATH = ["train.py", "minifqt/training.py", "models/resnet_cifar.py", "minifqt/layers/quantized.py",
        "minifqt/quantizers/psq.py", "minifqt/kernels/reference.py", "minifqt/optim.py"]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(name):
    places = [i for i, prefix in enumerate(ORDER) if f"{name}.".startswith(f"{prefix}.")]
    return places[0] if places else None


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_imports_go_downwards_only(path):
    name = module(path)
    if name == "minifqt":                                 # the top: it exports the rest
        return
    for imported in imports(path):
        if name.startswith("minifqt"):
            assert (imported.split(".")[0] not in ("models", "data", "train")
                    or name == "minifqt.study.setting")
            if rank(imported) is not None:
                assert rank(imported) <= rank(name), f"{name} imports {imported}"
        assert imported.split(".")[0] != "cupy" or name == "minifqt.backend"
        assert imported.split(".")[0] not in ("torch", "pickle", "random")


def test_every_module_of_minifqt_has_its_place_in_the_order():
    names = [module(path) for path in SOURCES if module(path).startswith("minifqt.")]
    assert [name for name in names if rank(name) is None] == []


def test_layers_and_models_never_ask_whether_something_is_quantized():
    for path in [*ROOT.glob("minifqt/layers/*.py"), *ROOT.glob("models/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If | ast.IfExp):
                asked = ast.unparse(node.test)
                assert not re.search(r"is_integer|Identity|quantiz|bits|recipe\b", asked), asked


def test_layers_and_models_do_not_know_the_device():
    for path in [*ROOT.glob("minifqt/layers/quantized.py"), *ROOT.glob("models/*.py")]:
        text = path.read_text()
        assert "import numpy" not in text
        assert ".get()" not in text


def test_one_step_is_read_in_seven_files_and_a_thousand_lines():
    assert len(PATH) == 7
    assert sum(len((ROOT / path).read_text().splitlines()) for path in PATH) <= 1000


def test_a_quantized_layer_shows_its_four_quantizers_and_three_products_by_name():
    text = (ROOT / "minifqt/layers/quantized.py").read_text()
    for name in ("Conv2d", "Linear"):
        body = text[text.index(f"class {name}"):]
        body = body[:body.find("\nclass ", 1)]
        for call in ("q.act(", "q.weight(", "q.grad_w(", "q.grad_x(", ".fprop(", ".wgrad(",
                     ".dgrad("):
            assert body.count(call) == 1, (name, call)


def public(tree):
    for node in ast.walk(tree):
        kinds = ast.FunctionDef | ast.ClassDef
        if isinstance(node, ast.Module | ast.ClassDef):
            yield from (child for child in node.body
                        if isinstance(child, kinds) and not child.name.startswith("_"))


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_files_open_with_a_docstring_and_public_docstrings_are_short(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in public(tree):
        assert len((ast.get_docstring(node) or "").splitlines()) <= 12, node.name
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_every_flag_is_explained_in_the_help():
    for action in train.parser()._actions:
        assert action.help, action.dest


def test_the_help_names_every_default_and_0_is_one():
    text = " ".join(train.parser().format_help().split())
    for flag in ("rises (default: 0)", "(default: 0.1)", "rounding (default: 0)", "(default: 0.0)"):
        assert flag in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


def test_dependencies_are_the_ones_that_are_used():
    listed = (ROOT / "requirements.txt").read_text().split()
    wanted = {re.split(r"[>=<]", line)[0] for line in listed}
    used = {name.split(".")[0] for path in SOURCES for name in imports(path)}
    assert wanted == used & {"numpy", "numba", "pillow", "PIL", "tqdm", "safetensors",
                             "threadpoolctl"}


def test_no_file_is_too_long_to_live_in():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 300, path


def test_documents_hold_no_placeholder_and_the_readme_shows_the_shipped_layer():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        assert not re.search(r"@[A-Z]+@|TODO", path.read_text()), path
    shown = (ROOT / "README.md").read_text().split("class Linear(Quantized):")[1].split("```")[0]
    shipped = (ROOT / "minifqt/layers/quantized.py").read_text()
    for line in shown.splitlines()[3:]:
        assert line in shipped, line


def test_the_readmes_own_quantizer_works():
    code = (ROOT / "README.md").read_text().split("## Your own quantizer")[1].split("```python")[1]
    names = {}
    try:
        exec(code.split("```")[0], names)
        net = models.build("resnet8", recipe="half4")
        assert str(net.conv1.q.grad_x) == "half4"
        x = np.random.default_rng(0).standard_normal((4, 5)).astype("float32")
        q = quantizers.create("half", bits=4)
        assert 0 < q.variance(x).sum() <= q.bound(x)
    finally:
        quantizers.base._REGISTRY.pop("half", None)


def test_each_mutant_still_finds_its_line_and_its_test():
    lost = []
    for mutant in parse((ROOT / "tests/mutants.txt").read_text()):
        path, name = mutant.test.split("::")
        if ((ROOT / mutant.file).read_text().count(mutant.old) != 1
                or f"def {name.partition('[')[0]}(" not in (ROOT / path).read_text()):
            lost.append(mutant)
    assert lost == []
