"""Rules of the code base that a reader would otherwise have to remember."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("globe_kernels", "globe_fit")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Inside globe_kernels a module imports from its own layer or from those above it.
LAYERS = [
    ("errors", "version", "families"),
    ("files",),
    ("checkpoint",),
    ("strategy",),
    ("ops", "routing"),
    ("functional", "memory"),
    ("bank", "cache", "modules", "scratch"),
    ("residency",),
    ("replacement",),
    ("transformers_plugin",),
    ("patching", "control"),
    ("testing",),
]


def imports(path: Path) -> set[str]:
    """Modules that a file imports at the top level or inside functions, in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_kernels_do_not_know_the_fit():
    for path in (ROOT / "globe_kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "globe_fit" for name in imports(path)), path


def test_layers_of_the_kernels():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "globe_kernels").rglob("*.py"):
        own = path.relative_to(ROOT / "globe_kernels").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in level, f"{path} has no layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "globe_kernels" and len(parts) > 1 and parts[1] in level:
                assert level[parts[1]] <= level[own], f"{path} imports {name}"


@pytest.mark.parametrize("package", ["transformers", "triton", "wandb", "typer"])
def test_the_kernels_import_without(package):
    script = f"""
        import importlib.util, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
        sys.modules[{package!r}] = None
        import globe_kernels
        assert globe_kernels.GlobeMoEFFN and globe_kernels.patch
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT, timeout=120)


def test_no_file_is_too_long():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, f"split {path}"


def test_every_module_and_public_function_says_what_it_is():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                small = len(node.body) <= 4 and isinstance(node, ast.FunctionDef)
                assert ast.get_docstring(node) or small, f"{path}: {node.name}"


def test_every_op_has_a_reference_and_a_test():
    helpers = {"__init__", "activations", "counters", "grouped", "triton_import", "tuning"}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    for path in (ROOT / "globe_kernels" / "ops").glob("*.py"):
        if path.stem not in helpers:
            functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert f"{path.stem}_ref" in functions, path
            assert f"from globe_kernels.ops.{path.stem} import" in tests, path
            assert len(re.findall(rf"\b{path.stem}_ref\b", tests)) > 1 or path.stem == "moe_ffn", path
