"""Rules of the code base that a reader would otherwise have to remember."""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from globe_kernels.strategies import DENSE, STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("globe_kernels", "globe_fit")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Inside a package a room imports from its own line and from the lines above it.
ROOMS = {
    "globe_kernels": [
        ("errors", "lazy", "locks", "version"),
        ("units",),
        ("table",),
        ("format",),
        ("ops",),
        ("functional",),
        ("strategies",),
        ("model",),
        ("serving",),
        ("testing",),
    ],
    "globe_fit": [
        ("config", "result", "run"),
        ("sizes", "data", "linalg"),
        ("calibration", "solvers"),
        ("measure", "plan"),
        ("model_card",),
        ("export",),
        ("finish", "healing"),
        ("fitting",),
        ("compression",),
        ("cli",),
        ("__main__",),
    ],
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports at the top level or inside functions, in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_folder_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert folders == {*listed} - {"globe_fit.tiny_moe"}


def test_the_kernels_do_not_know_the_fit():
    for path in (ROOT / "globe_kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "globe_fit" for name in imports(path)), path


@pytest.mark.parametrize("package", ROOMS)
def test_rooms(package):
    level = {name: number for number, names in enumerate(ROOMS[package]) for name in names}
    for path in (ROOT / package).rglob("*.py"):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in level, f"{path} has no room"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in level:
                assert level[parts[1]] <= level[room], f"{path} imports {name}"


def strategy_comparisons(path: Path) -> list[int]:
    """Lines that compare with the name of a strategy, or match it."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        else:
            continue
        parts = [one for part in compared for one in getattr(part, "elts", [part])]
        if {one.value for one in parts if isinstance(one, ast.Constant)} & {*STRATEGIES, DENSE.name}:
            lines.append(node.lineno)
    return sorted(lines)


def test_only_the_strategies_compare_their_names(tmp_path):
    """A strategy is one file and one line of its table: no other place may ask which strategy it has."""
    for path in [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]:
        if "strategies" not in path.parts:
            assert not strategy_comparisons(path), f"{path} compares the name of a strategy"
    planted = tmp_path / "planted.py"
    planted.write_text('x = 1 if name == "cached" else 2\ny = {"cached": 3}\nz = name in ("auto", "dense")\n')
    assert strategy_comparisons(planted) == [1, 3]


def test_a_new_strategy_is_one_file_and_one_line():
    folder = ROOT / "globe_kernels" / "strategies"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "budget", "cost", "palette_codes"}
    assert files == {*STRATEGIES, DENSE.name}


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


def test_nothing_heavy_is_imported_before_it_is_used():
    """So help, mistakes in options and `import globe_kernels` cost a tenth of a second, not the seconds of torch."""
    script = """
        import sys
        import globe_kernels, globe_fit, globe_fit.cli.app
        heavy = {"torch", "transformers", "numpy", "matplotlib", "safetensors"} & {*sys.modules}
        assert not heavy, heavy
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        assert "globe" in AUTO_QUANTIZER_MAPPING
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=ROOT, timeout=120)


def test_every_module_and_public_function_says_what_it_is():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                small = len(node.body) <= 4 and isinstance(node, ast.FunctionDef)
                assert ast.get_docstring(node) or small, f"{path}: {node.name}"


def test_first_lines_do_not_make_a_reader_guess():
    """A first line that begins so has no verb, or refers to another docstring."""
    vague = ("What", "How", "Which", "Where", "As", "Of", "Those", "By", "From", "Everything", "In what")
    for path in [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = (ast.get_docstring(node) or " ").split()[:1]
                assert not {*first} & {*vague}, f"{path}: {getattr(node, 'name', 'module')}"


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_kernel_has_a_reference_and_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "kernels").rglob("test_*.py"))
    launchers = {path: functions(path) for path in (ROOT / "globe_kernels" / "ops").glob("*.py")}
    names = [
        (path, name.removeprefix("launch_"))
        for path, found in launchers.items()
        for name in found
        if name.startswith("launch_") and not name.endswith("_backward")
    ]
    assert len(names) > 10
    for path, name in names:
        assert f"{name}_ref" in launchers[path], f"{path}: {name}"
        assert f"launch_{name}" in tests and f"{name}_ref" in tests, f"{path}: {name}"


def test_the_product_calls_every_registered_op():
    registered = {}
    for path in (ROOT / "globe_kernels" / "ops").glob("*.py"):
        for name in re.findall(r"^(\w+) = register_op\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            registered[f"globe_kernels.ops.{path.stem}.{name}"] = path
    assert len(registered) == 7
    for name, home in registered.items():
        assert any(name in imports(path) for path in SOURCES if path != home), f"no part of the product calls {name}"
