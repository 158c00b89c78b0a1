"""The recipes run: the commands that their README.md files give for the model that ships here, with fewer steps."""

import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md") if path.parent.name != "tiny_moe")
NEEDS_MORE = "lm_eval"  # the lm-eval harness and its tasks
RUN_ALL = """
import json, runpy, sys
from globe_fit.__main__ import main

for program, *arguments in json.load(sys.stdin):
    try:
        if program == "globe":
            sys.argv = ["globe", *arguments]
            main()
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, arguments
"""


def commands(recipe: str, block: int) -> list[list[str]]:
    """The commands of a shell block of a recipe, as words."""
    text = (EXAMPLES / recipe / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[block].splitlines()
    return [line.partition(" #")[0].split() for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_index_and_has_a_command_for_a_model_of_the_user(recipe):
    assert f"({recipe}/README.md)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(words[0] in ("globe", "python") for words in commands(recipe, -1))
    assert any("MODEL_DIR" in words for words in commands(recipe, -1))


@pytest.mark.slow
def test_the_commands_for_the_shipped_model_run(warm_python, tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    text = (EXAMPLES / "tiny_moe" / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "TEXT").write_text(text[:8000], encoding="utf-8")
    given = [words for recipe in RECIPES if recipe != NEEDS_MORE for words in commands(recipe, 0)]
    fits = [words for words in given if words[1] in ("fit", "sweep") or words[1].endswith("compress.py")]
    assert len(given) >= 5 and len(fits) >= 4
    # the last of two values wins; the model would write a text for a minute
    shortened = [[*words, "--steps", "3"] if words in fits else words for words in given]
    text = [
        [] if {"sweep", "--no-calibrate"} & {*words} or words not in fits else ["--calibrate", "TEXT"]
        for words in given
    ]
    shortened = [[*words, *more] for words, more in zip(shortened, text, strict=True)]
    done = warm_python.run("-c", RUN_ALL, cwd=tmp_path, stdin=json.dumps(shortened))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    written = {path.parent.name for path in (tmp_path / "out").glob("**/globe_config.json")}
    assert {"compress", "fast", "patched"} <= written and len(written) == 7


def test_the_chat_template_is_that_of_the_training_script():
    template = runpy.run_path(str(EXAMPLES / "train_tiny_moe.py"))["CHAT_TEMPLATE"]
    assert (EXAMPLES / "tiny_moe" / "chat_template.jinja").read_text(encoding="utf-8") == template
