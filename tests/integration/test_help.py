"""The help of the command line: the defaults that it shows are the defaults of the settings."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from globe_fit.cli import app as command_line
from globe_fit.config import DEFAULT_RATIO, SNAPSHOT_MINUTES, AlternatingConfig, FitConfig, VarProConfig

COMMANDS: dict = get_command(command_line.app).commands  # type: ignore[attr-defined]
DEFAULTS = {field.name: str(field.default) for field in fields(FitConfig) if field.default is not None}
SHOWN = {
    **DEFAULTS,
    "ratio": str(DEFAULT_RATIO),
    "palette": "no limit",
    "device": "a GPU where there is one",
    "steps": f"varpro {VarProConfig.steps}, alternating {AlternatingConfig.steps}",
}


def test_a_fit_shows_the_defaults_of_its_settings():
    shown = {}
    for parameter in COMMANDS["fit"].params:
        if found := re.search(r"\(([^()]+)\)", parameter.help or ""):
            shown[parameter.name] = found[1]
    assert shown == {name: SHOWN[name] for name in shown}
    assert shown.keys() == {"ratio", "support", "palette", "phi", "scope", "solver", "steps", "seed", "device"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_has_a_default_of_its_own_for_a_setting_of_a_fit(command):
    for parameter in COMMANDS[command].params:
        if parameter.name in DEFAULTS or parameter.name in ("rank", "atoms", "palette", "ratio", "steps"):
            assert parameter.default is None, parameter.name
        if parameter.name == "snapshot_minutes":
            assert parameter.default == SNAPSHOT_MINUTES


def test_no_default_is_a_literal_in_a_help_text():
    """Only examples, which follow "such as", hold numbers of their own."""
    tree = ast.parse(Path(str(command_line.__file__)).read_text(encoding="utf-8"))
    literals = [
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "help"
        for part in ast.walk(node.value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    assert len(literals) > 30
    for text in literals:
        assert not re.search(r"\([^)]*\d", text), text


def test_the_order_of_the_commands():
    assert list(COMMANDS) == ["plan", "fit", "heal", "sweep", "export", "eval", "inspect", "report", "demo"]
