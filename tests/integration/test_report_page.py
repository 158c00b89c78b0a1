"""The page of `globe report`: well-formed, complete, and nothing in it that has to be fetched."""

import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from globe_fit.cli.report_page import write_report
from globe_fit.run.metrics import METRICS

_VOID = {"meta", "br", "link", "img"}
FIGURES = ("error", "layers", "popularity", "palettes", "support", "coherence", "spectra", "energy-captured")
OF_A_STREAM = ("error", "support", "coherence", "energy-captured", "step-seconds")


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


def test_a_checkpoint(fit_tiny, tmp_path):
    directory, result = fit_tiny()
    written = write_report(directory, tmp_path / "page.html", png=True)
    assert written["finished"] and written["bytes"]["dense_experts"] == result.config.base.dense_bytes
    page = read(tmp_path / "page.html")
    names = [Path(path).stem.removeprefix("page-") for path in written["png"]]
    assert names == [*FIGURES, "step-seconds"]
    assert page.tags["svg"] == len(names)
    for path in written["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    for family in ("gate", "up"):
        report = result.report["families"][family]
        assert written["relative_error"][family] == report["relative_error"]
        assert f"{report['relative_error']:.4f}relative error, {family}" in page.text
        assert f"SVD in the same bytes {report['svd_equal_bytes']:.4f}" in page.text
    assert result.status.advice in page.text
    for name in ("atom_norm_max", "support_median", "gram_condition", "peak_host_bytes"):
        assert METRICS[name].meaning in page.text


def test_the_dense_model_adds_spectra(fit_tiny, save_tiny, tmp_path):
    write_report(fit_tiny()[0], tmp_path / "page.html", base=save_tiny("qwen3_moe"))
    with_base = read(tmp_path / "page.html").text.count("gate, layer ")
    write_report(fit_tiny()[0], tmp_path / "page.html")
    assert with_base > read(tmp_path / "page.html").text.count("gate, layer ") > 0


def test_a_checkpoint_that_came_without_what_the_fit_measured(fit_tiny, tmp_path):
    directory = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    (directory / "metrics.jsonl").unlink()
    (directory / "fit_report.json").unlink()
    written = write_report(directory, png=True)
    assert [Path(path).stem for path in written["png"]] == ["report-popularity", "report-palettes", "report-support"]
    assert written["relative_error"] == {"gate": None, "up": None}
    read(directory / "report.html")


@pytest.mark.parametrize("records", [1, 3])
def test_an_unfinished_fit(fit_tiny, tmp_path, records):
    stream = tmp_path / ".snapshot" / "metrics.jsonl"
    stream.parent.mkdir()
    stream.write_text("".join(json.dumps(record) + "\n" for record in fit_tiny()[1].history[:records]) + '{"st')
    written = write_report(tmp_path, png=True)
    assert not written["finished"] and set(written["relative_error"]) == ({"gate"} if records == 1 else {"gate", "up"})
    assert {Path(path).stem.removeprefix("report-") for path in written["png"]} == set(OF_A_STREAM)
    assert "A fit that is not finished: gate at step" in read(tmp_path / "report.html").text


def test_names_from_a_checkpoint_are_text(fit_tiny, tmp_path):
    directory = Path(shutil.copytree(fit_tiny()[0], tmp_path / "globe"))
    config = json.loads((directory / "globe_config.json").read_text())
    config["base"]["name"] = "<script>alert(1)</script>"
    (directory / "globe_config.json").write_text(json.dumps(config))
    write_report(directory)
    assert read(directory / "report.html").tags["script"] == 0
