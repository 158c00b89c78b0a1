"""The command line, run in the process of the test, and models that a test may damage."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from globe_fit.__main__ import main

QUICK = ("--ratio", "0.8", "--support", "4", "--steps", "3", "--device", "cpu")


@pytest.fixture
def globe(monkeypatch, capsys):
    """Runs `globe ARGS` in this process: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["globe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


@pytest.fixture
def model_dir(save_tiny, tmp_path, request) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(save_tiny(getattr(request, "param", "qwen3_moe")), tmp_path / "model"))


@pytest.fixture
def with_tokenizer(model_dir) -> Path:
    vocabulary = {chr(97 + letter): letter for letter in range(26)} | {" ": 26, "?": 27}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(model_dir)
    (model_dir / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    return model_dir


def assert_refused(result: tuple[int, str, str], code: int, sentence: str) -> None:
    found, stdout, stderr = result
    lines = [line for line in stderr.splitlines() if not re.match(r"\d\d:\d\d ", line)]
    assert (found, stdout) == (code, "")
    assert len(lines) == 1 and lines[0].startswith("globe: "), stderr
    assert sentence in lines[0]
