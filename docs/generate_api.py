"""Write docs/api.md from the code: every public name of globe_kernels and globe_fit.

    python docs/generate_api.py            writes the page
    python docs/generate_api.py --check    exit code 1 when the page differs from the code

Signatures, fields with their comments, and docstrings are copied from the source.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
PACKAGES = ("globe_kernels", "globe_fit")
_HEAD = """# Public functions and classes

`python docs/generate_api.py` writes this page from the code. `globe_kernels` runs a checkpoint, `globe_fit` makes it.
Every name that is not on this page is internal and may change without notice.
"""
_WIDTH = 100  # of a call on one line


def page() -> str:
    """The text of docs/api.md."""
    parts = [_HEAD]
    for package in PACKAGES:
        module = importlib.import_module(package)
        parts.append(f"## {package}\n\n{inspect.getdoc(module)}\n")
        for name in sorted(module.__all__, key=str.lower):
            parts.append(f"### {package}.{name}\n\n{_entry(getattr(module, name), name)}")
    return "\n".join(parts)


def _entry(thing: Any, name: str) -> str:
    """The section of one public name: its file, its call or its fields, its docstring, its methods."""
    if not callable(thing):
        return f"{type(thing).__name__}: a constant.\n"
    file = Path(inspect.getfile(thing)).resolve()
    source = file.read_text(encoding="utf-8")
    nodes = (node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    node = next(node for node in nodes if node.name == name)
    code, methods = _call(node, source) if isinstance(node, ast.FunctionDef) else _class_code(node, source), []
    if isinstance(node, ast.ClassDef):
        is_module = "forward" in vars(thing)  # of torch: its other methods serve the package
        methods = [line for each in node.body if (line := _method(each, source, only_forward=is_module))]
    doc = (ast.get_docstring(node) or "").replace("*", r"\*")
    parts = [f"In `{file.relative_to(ROOT).as_posix()}`.", f"```\n{code}\n```", doc, "\n".join(methods)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _call(node: ast.FunctionDef, source: str, name: str = "", width: int = _WIDTH) -> str:
    """The call of a function without `self`; one argument a line where the call is longer than `width`."""
    arguments = _arguments(node.args, source)
    name, returns = name or node.name, f" -> {ast.unparse(node.returns)}" if node.returns and not name else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= width:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(arguments: ast.arguments, source: str) -> list[str]:
    """Each argument as the source has it, and the star before those that need their name."""

    def text(argument: ast.arg, default: ast.expr | None) -> str:
        parts = (ast.get_source_segment(source, node) for node in (argument, default) if node is not None)
        return " = ".join(filter(None, parts))

    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    lines = [text(*each) for each in zip(plain, defaults, strict=True) if each[0].arg not in ("self", "cls")]
    if arguments.kwonlyargs:
        lines += ["*", *(text(*each) for each in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))]
    return lines


def _class_code(node: ast.ClassDef, source: str) -> str:
    """The call that makes an object, or the fields of a dataclass with their comments."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _call(each, source, node.name)
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    lines = source.splitlines()
    shown = [line for each in fields for line in lines[each.lineno - 1 : each.end_lineno]]
    return "\n".join([f"class {node.name}" + (":" if shown else ""), *shown])


def _method(node: ast.stmt, source: str, *, only_forward: bool) -> str:
    """A line for a public method or property with a docstring: its call and the first sentence; else nothing."""
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or not ast.get_docstring(node):
        return ""
    if only_forward and node.name != "forward":
        return ""
    is_property = any(ast.unparse(mark).endswith("property") for mark in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    call = f"{node.name}{returns}" if is_property else _call(node, source, width=10**6)
    first = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").replace("*", r"\*")
    return f"* `{call}`: {first}"


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/api.md differs from the code; `python docs/generate_api.py` writes it again.")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
