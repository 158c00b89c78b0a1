"""The documents agree with the code: their files exist, their code runs, their generated parts are current."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import globe_fit
import globe_kernels

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LOG = ROOT / "docs" / "log.md"  # its entries name files as they were on their date
GUIDES = [README, *sorted(set((ROOT / "docs").glob("*.md")) - {LOG})]  # their code runs
EXAMPLES = ROOT / "examples"
DOCUMENTS = [
    *GUIDES,
    *sorted((ROOT / "docs" / "models").glob("*.md")),
    *sorted(EXAMPLES.rglob("README.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "csrc" / "README.md",
]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(language: str, documents: list[Path]) -> list[str]:
    texts = (document.read_text(encoding="utf-8") for document in documents)
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documented_files_exist(document):
    """A file in backticks is named from the root; a table of the files of one folder names them from that folder."""
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|toml|md|txt))`", text)
    written_by_programs = ("out/", "benchmarks/results")
    for name in names:
        if not name.startswith(written_by_programs):
            assert (ROOT / name).exists() or (document.parent / name).exists(), f"{name_of(document)} names {name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, LOG], ids=name_of)
def test_links_lead_to_files_and_headings(document):
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#?)([^)\s]*)\)", document.read_text("utf-8")):
        path = document.parent / target if target else document
        assert path.exists(), f"{name_of(document)} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in anchors, f"{name_of(document)} links to {target}#{heading}"


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_title_of_the_log_has_a_date_and_a_verdict():
    titles = re.findall(r"^## (.*)$", LOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles
    for title in titles:
        assert re.match(r"20\d\d-\d\d-\d\d: .+: .*(confirmed|rejected|mixed)", title), title


def test_the_pages_of_the_models_are_current(warm_python):
    done = warm_python.run("docs/generate_models.py", "--check", cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_site_is_built_without_a_warning_and_shows_every_public_name(tmp_path):
    """A link to a page or a heading that does not exist is a warning; the pages load nothing from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    shown = re.findall(r'<h3 id="(globe_\w+)[.\w]*[.](\w+)"', (tmp_path / "api.html").read_text(encoding="utf-8"))
    for package in (globe_kernels, globe_fit):
        assert sorted(name for owner, name in shown if owner == package.__name__) == sorted(package.__all__)
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="https?:', text), page


def test_the_figures_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "figures"))
    import draw  # type: ignore[import-not-found]

    for drawing in (draw.method, draw.fit, draw.strategies):
        path = ROOT / "docs" / "figures" / f"{drawing.__name__}.svg"
        assert path.read_text(encoding="utf-8") == drawing().svg(), (
            "python docs/figures/draw.py draws the figures again"
        )


RUN_ALL = """
import json, sys
from globe_fit.__main__ import main

commands, pages = json.load(sys.stdin)
for command in commands:
    sys.argv = ["globe", *command]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, command
for page in pages:
    exec(compile(page, "a page", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.slow
def test_the_code_of_the_guides_runs(warm_python, tmp_path):
    """The shell block of README.md makes the files that the Python blocks use; all run in one empty directory."""
    model, text = EXAMPLES / "tiny_moe", EXAMPLES / "tiny_moe" / "heldout.txt"
    (tmp_path / "MODEL_DIR").symlink_to(model)
    (tmp_path / "TEXT").write_text(text.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    (tmp_path / "fit.toml").write_text("[varpro]\nsteps = 4\n")
    commands = [line for block in blocks("bash", GUIDES) for line in block.splitlines() if line.startswith("globe ")]
    assert len(commands) >= 9
    # README.md first: the other pages use the checkpoint that its commands make
    commands.sort(key=lambda command: command not in README.read_text(encoding="utf-8"))
    words = [command.split("#")[0].split()[1:] for command in commands]
    words = [[*one, "--config", "fit.toml"] if one[0] in ("fit", "sweep") else one for one in words]
    # the model would write for a minute
    words = [[*one, "--calibrate", "TEXT"] if one[0] == "fit" else one for one in words]
    pages = ["\n".join(blocks("python", [page])) for page in GUIDES if blocks("python", [page])]
    assert len(pages) >= 4
    done = warm_python.run("-c", RUN_ALL, cwd=tmp_path, stdin=json.dumps([words, pages]))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_test_command_of_the_readme_is_the_command_of_ci():
    assert "make check" in (ROOT / ".ci" / "run").read_text()
    assert any("make check" in block for block in blocks("bash", [README]))
