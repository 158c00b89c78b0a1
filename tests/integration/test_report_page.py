"""The page of `globe report`: well-formed, complete, and nothing in it that has to be fetched."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from globe_fit.cli.report.page import write_report
from globe_fit.measure.evaluate import record_evaluation
from globe_fit.run.metrics import METRICS
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import RequestError
from globe_kernels.format.names import EVALUATION_NAME

_VOID = {"meta", "br", "link", "img"}
FIGURES = ("error", "layers", "popularity", "coherence", "energy-captured", "step-seconds")
OF_A_STREAM = ("error", "coherence", "support", "energy-captured", "step-seconds")
EVALUATION = {
    "text": "heldout.txt",
    "tokens": 12345,
    "device": "cpu",
    "threads": 2,
    "strategies": ["scratch"],
    "command": "globe eval out/globe --base model --text heldout.txt",
    "dense": {"perplexity": 30.21, "tokens_per_s": 8000.0},
    "globe": {"perplexity": 30.3, "kl": 0.0047, "top1": 0.951, "tokens_per_s": 6240.0, "timed_batches": 5},
}


class Page(HTMLParser):
    """Fails for tags that are not closed in order; counts tags and collects ids, addresses and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text and "@import" not in text and "url(http" not in text
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.removeprefix("#") in page.ids for reference in page.references)
    return page


def changed(directory: Path, out: Path, change, *, evaluation: dict | None = None, bare: bool = True) -> Path:
    """Copies a checkpoint, changes its fit report, adds an evaluation; bare: without most figures, which take time."""
    shutil.copytree(directory, out)
    if bare:
        (out / "metrics.jsonl").unlink()
    report = json.loads((out / "fit_report.json").read_text())
    if bare:
        del report["families"]
    change(report)
    (out / "fit_report.json").write_text(json.dumps(report))
    if evaluation is not None:
        record_evaluation(GlobeCheckpoint(out), evaluation)
    return out


def names_of(written: dict) -> list[str]:
    stem = Path(written["html"]).stem
    return [Path(path).stem.removeprefix(f"{stem}-") for path in written["png"]]


def test_a_checkpoint(fit_tiny, tmp_path):
    directory, result = fit_tiny()
    written = write_report(directory, tmp_path / "page.html", png=True)
    assert written["finished"] and written["sizes"]["gate_up"]["dense"] == result.config.base.dense_bytes
    page = read(tmp_path / "page.html")
    names = names_of(written)
    spectra = [name for name in names if name.startswith("spectrum-")]
    assert sorted({*names} - {*spectra, "palettes"}) == sorted(FIGURES) and len(spectra) == 6
    assert page.tags["svg"] == page.tags["figcaption"] == len(names)
    for path in written["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    for family in ("gate", "up"):
        report = result.report["families"][family]
        assert written["relative_error"][family] == report["relative_error"]
        assert f"{report['relative_error']:.4f}" in page.text and f"{report['svd_equal_bytes']:.4f}" in page.text
    assert result.status.advice in page.text
    for name in ("atom_norm_max", "support_median", "gram_condition", "peak_host_bytes"):
        assert METRICS[name].meaning in page.text
    # colours of figures are variables of the page, which has two sets of them
    svgs = re.findall(r"<svg .*?</svg>", (tmp_path / "page.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not any(re.search(r": *#[0-9a-f]{3}|rgb\(", svg) for svg in svgs)
    assert all("var(--gate)" in svg or "var(--up)" in svg for svg in svgs)


def test_a_page_says_how_to_measure_until_the_quality_is_measured(fit_tiny, save_tiny, tmp_path):
    directory = changed(fit_tiny()[0], tmp_path / "globe", lambda _: None)
    write_report(directory, tmp_path / "page.html")
    text = read(tmp_path / "page.html").text
    assert f"globe eval {directory} --base MODEL_DIR --text TEXT" in text
    assert "Perplexity" not in text and "Slower" not in text and "Whole model" not in text
    write_report(directory, tmp_path / "page.html", base=save_tiny("qwen3_moe"))
    assert f"--base {save_tiny('qwen3_moe')} --text TEXT" in read(tmp_path / "page.html").text


def test_the_first_screen(fit_tiny, tmp_path):
    def change(report):
        report["base"] = {"bytes": 300_000, "rest_bytes": 100_000, "top_k": 2}
        report["command"] = "globe fit model -o out/globe --ratio 0.8"

    write_report(changed(fit_tiny()[0], tmp_path / "globe", change, evaluation=EVALUATION), tmp_path / "page.html")
    text = read(tmp_path / "page.html").text
    shown = ("perplexity 30.30 in place of 30.21", "KL(dense, GloBE)", "0.0047", "dense 30.21 (+0.3 %)", "95.1 %",
             "Whole model on disk", "Gate and up on disk", "Resident in memory", "Peak in memory", "Slower",
             "0.78 of the dense speed in prefill, CPU with 2 threads (measured)",
             "globe fit model -o out/globe --ratio 0.8", EVALUATION["command"])  # fmt: skip
    places = [text.index(words) for words in shown]
    assert places == sorted(places)
    assert "MODEL_DIR" not in text


def test_an_evaluation_of_another_fit_is_not_shown(fit_tiny, tmp_path):
    directory = changed(fit_tiny()[0], tmp_path / "globe", lambda _: None, evaluation=EVALUATION)
    recorded = json.loads((directory / EVALUATION_NAME).read_text())
    (directory / EVALUATION_NAME).write_text(json.dumps(recorded | {"fingerprint": "of another fit"}))
    write_report(directory)
    text = read(directory / "report.html").text
    assert f"globe eval {directory} --base MODEL_DIR --text TEXT" in text
    assert EVALUATION["text"] not in text and "30.21" not in text and "Slower" not in text


@pytest.mark.parametrize(
    "tokens_per_s, verdict", [(7950.0, "As fast"), (8800.0, "Faster"), (4000.0, "Slower")], ids=lambda value: str(value)
)
def test_a_verdict_on_the_speed(fit_tiny, tmp_path, tokens_per_s, verdict):
    found = EVALUATION | {"device": "cuda", "globe": EVALUATION["globe"] | {"tokens_per_s": tokens_per_s}}
    write_report(changed(fit_tiny()[0], tmp_path / "globe", lambda _: None, evaluation=found))
    text = read(tmp_path / "globe" / "report.html").text
    assert f"{verdict}{tokens_per_s / 8000:.2f} of the dense speed in prefill, cuda (measured)" in text


@pytest.mark.parametrize(
    "status, level",
    [
        ({"completed": True, "level": "settled"}, "settled"),
        ({"completed": True, "level": "unsettled"}, "unsettled"),
        ({"completed": False, "level": "diverged"}, "diverged"),
        ({"completed": False}, "diverged"),  # reports of the first version
        ({"completed": True}, ""),
    ],
)
def test_the_advice_has_the_colour_of_its_level(fit_tiny, tmp_path, status, level):
    def change(report):
        report["status"] = status | {"advice": "Some advice."}

    write_report(changed(fit_tiny()[0], tmp_path / "globe", change))
    page = (tmp_path / "globe" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="advice {level}">Some advice.</p>' in page


def test_only_a_page_of_a_report_is_replaced(fit_tiny, tmp_path):
    directory = changed(fit_tiny()[0], tmp_path / "globe", lambda _: None)
    foreign = tmp_path / "index.html"
    foreign.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(RequestError, match="index.html is not a page of globe report; move it"):
        write_report(directory, foreign)
    assert foreign.read_text() == "<!doctype html><title>mine</title>"
    for _ in range(2):
        write_report(directory)


def test_a_figure_with_a_single_value_is_a_sentence(fit_tiny, tmp_path):
    directory = changed(fit_tiny()[0], tmp_path / "globe", lambda _: None, bare=False)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    starts = [line for line in lines if json.loads(line)["step"] == 0]
    (directory / "metrics.jsonl").write_text("\n".join(starts))
    report = json.loads((directory / "fit_report.json").read_text())
    del report["metrics_sha256"]
    (directory / "fit_report.json").write_text(json.dumps(report))
    written = write_report(directory, png=True)
    assert not {"error", "energy-captured", "step-seconds", "support"} & {*names_of(written)}
    text = read(directory / "report.html").text
    assert "There is one record so far" in text and "Every expert mixes 4 atoms" in text


def test_the_dense_model_adds_spectra(fit_tiny, save_tiny, tmp_path):
    directory = changed(fit_tiny()[0], tmp_path / "globe", lambda _: None)
    write_report(directory, base=save_tiny("qwen3_moe"))
    text = read(directory / "report.html").text
    assert text.count("gate, layer ") == text.count("up, layer ") == 10  # five figures and five rows


def test_a_checkpoint_that_came_without_what_the_fit_measured(fit_tiny, tmp_path):
    directory = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    (directory / "metrics.jsonl").unlink()
    (directory / "fit_report.json").unlink()
    written = write_report(directory, png=True)
    assert [name for name in names_of(written) if name != "palettes"] == ["popularity"]
    assert written["relative_error"] == {"gate": None, "up": None}
    read(directory / "report.html")


@pytest.mark.parametrize("records", [1, 3])
def test_an_unfinished_fit(fit_tiny, tmp_path, records):
    stream = tmp_path / ".snapshot" / "metrics.jsonl"
    stream.parent.mkdir()
    stream.write_text("".join(json.dumps(record) + "\n" for record in fit_tiny()[1].history[:records]) + '{"st')
    written = write_report(tmp_path, png=True)
    assert not written["finished"] and set(written["relative_error"]) == ({"gate"} if records == 1 else {"gate", "up"})
    page = read(tmp_path / "report.html")
    assert {*names_of(written)} == ({"coherence"} if records == 1 else {*OF_A_STREAM})
    assert "a fit that is not finished" in page.text and "gate at step" in page.text and "MODEL_DIR" not in page.text


def test_names_from_a_checkpoint_are_text(fit_tiny, tmp_path):
    directory = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    config = json.loads((directory / "globe_config.json").read_text())
    config["base"]["name"] = "<script>alert(1)</script>"
    (directory / "globe_config.json").write_text(json.dumps(config))
    write_report(directory)
    assert read(directory / "report.html").tags["script"] == 0


def test_a_text_that_is_too_short_says_nothing_about_speed(fit_tiny, tmp_path):
    short = EVALUATION | {"globe": EVALUATION["globe"] | {"timed_batches": 1}}
    write_report(changed(fit_tiny()[0], tmp_path / "globe", lambda _: None, evaluation=short))
    text = read(tmp_path / "globe" / "report.html").text
    assert "Not knownthe text is too short to time; 0.78 of the dense speed in one go" in text
