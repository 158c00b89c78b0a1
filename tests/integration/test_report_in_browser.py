"""The page of `globe report` in a browser: phone, tablet and desktop, in light and in dark."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, sync_playwright

from globe_fit.cli.report.page import write_report
from globe_fit.measure.evaluate import record_evaluation
from globe_kernels import GlobeCheckpoint

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
WIDTHS = (390, 820, 1400)
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
LEAST_TEXT, LEAST_CONTRAST = 9, 4.5  # pixels; WCAG AA

pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")

# Returns a sentence per fault of the page as it is shown.
FAULTS = """([leastText, leastContrast]) => {
  const faults = [], name = e => `${e.tagName} "${e.textContent.trim().slice(0, 40)}"`;
  const say = (fault, e) => fault && faults.push(`${name(e)} ${fault}`);
  const box = e => e.getBoundingClientRect(), style = e => getComputedStyle(e);
  const shown = e => box(e).width > 0 && e.checkVisibility({contentVisibilityAuto: true});
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const seen = new Map();
  const rgba = colour => {
    if (!seen.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      seen.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return seen.get(colour);
  };
  const linear = v => v < 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = e => rgba(style(e).backgroundColor)[3] ? rgba(style(e).backgroundColor) : ground(e.parentElement);
  const isPale = (e, colour) => {
    const [dark, light] = [luminance(rgba(colour)), luminance(ground(e))].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05) < leastContrast && 'has little contrast';
  };
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`the page is ${wide} pixels wide`);
  for (const e of document.querySelectorAll('body, body *:not(svg *)')) {
    if (!shown(e)) continue;
    const scrolls = e.closest('.scroll') && !e.matches('.scroll');
    const leaves = box(e).right > innerWidth + 0.5 || box(e).left < -0.5;
    say(!scrolls && leaves && 'leaves the window', e);
    const isBox = style(e).display !== 'inline' && !e.matches('.scroll, svg');
    say(isBox && e.scrollWidth > e.clientWidth + 1 && 'is wider than its box', e);
    const hasText = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    say(hasText && isPale(e, style(e).color), e);
  }
  for (const svg of document.querySelectorAll('svg')) {
    if (!shown(svg)) continue;
    const scale = box(svg).width / svg.viewBox.baseVal.width, texts = [...svg.querySelectorAll('text')];
    texts.forEach((text, i) => {
      const a = box(text);
      say(parseFloat(style(text).fontSize) * scale < leastText && 'is small', text);
      say(isPale(svg, style(text).fill), text);
      say((a.left < box(svg).left - 1 || a.right > box(svg).right + 1) && 'leaves its figure', text);
      for (const other of texts.slice(i + 1)) {
        const b = box(other);
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const up = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        say(across > 1 && up > 4 && `overlaps ${name(other)}`, text);  // a box is higher than its letters
      }
    });
  }
  return faults;
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(fit_tiny, save_tiny, tmp_path_factory) -> dict[str, Path]:
    """Pages of a measured checkpoint, of a diverged checkpoint with a long name, and of an unfinished fit."""
    directory, result = fit_tiny()
    folder = tmp_path_factory.mktemp("pages")
    written = {name: folder / f"{name}.html" for name in ("measured", "diverged", "unfinished")}

    measured = Path(shutil.copytree(directory, folder / "measured"))
    report = json.loads((measured / "fit_report.json").read_text())
    report["base"] = {"bytes": 300_000, "rest_bytes": 100_000, "top_k": 2}
    report["command"] = "globe fit models/Qwen3-30B-A3B-Instruct-2507 -o out/globe --ratio 0.625 --palette 32"
    (measured / "fit_report.json").write_text(json.dumps(report))
    quality = {"perplexity": 30.3, "kl": 0.0047, "top1": 0.951, "tokens_per_s": 6240.0, "timed_batches": 5}
    facts = {"text": "heldout.txt", "tokens": 12345, "device": "cpu", "threads": 2, "strategies": ["scratch"]}
    dense = {"perplexity": 30.21, "tokens_per_s": 8000.0}
    record_evaluation(
        GlobeCheckpoint(measured), facts | {"command": "globe eval out/globe", "dense": dense, "globe": quality}
    )
    write_report(measured, written["measured"], base=save_tiny("qwen3_moe"))

    diverged = Path(shutil.copytree(directory, folder / "diverged"))
    config = json.loads((diverged / "globe_config.json").read_text())
    config["base"]["name"] = "a-model-with-a-name-" + 4 * "of-many-words-"
    (diverged / "globe_config.json").write_text(json.dumps(config))
    report["status"] = {"completed": False, "level": "diverged", "advice": "The fit of gate diverged."}
    (diverged / "fit_report.json").write_text(json.dumps({"status": report["status"]}))
    (diverged / "metrics.jsonl").unlink()
    write_report(diverged, written["diverged"])

    stream = folder / "unfinished" / ".snapshot" / "metrics.jsonl"
    stream.parent.mkdir(parents=True)
    stream.write_text("".join(json.dumps(record) + "\n" for record in result.history[:3]))
    write_report(folder / "unfinished", written["unfinished"])
    return written


def faults(browser: Browser, path: Path, widths: Sequence[int] = WIDTHS) -> set[str]:
    """Faults of a page as it opens and with all diagnostics unfolded, at each width in both colour schemes."""
    found = set()
    with browser.new_context() as context:
        page = context.new_page()
        page.on("request", lambda request: request.url == path.as_uri() or found.add(f"asks for {request.url}"))
        page.on("console", lambda message: message.type in ("error", "warning") and found.add(message.text))
        page.on("pageerror", lambda error: found.add(str(error)))
        page.goto(path.as_uri())
        for unfolded in (False, True):
            page.evaluate("open => document.querySelectorAll('details').forEach(e => e.open = open)", unfolded)
            for width in widths:
                page.set_viewport_size({"width": width, "height": 844})
                for scheme in SCHEMES:
                    page.emulate_media(color_scheme=scheme)
                    faults = page.evaluate(FAULTS, [LEAST_TEXT, LEAST_CONTRAST])
                    found |= {f"{width}, {scheme}: {fault}" for fault in faults}
    return found


@pytest.mark.parametrize("name", ["measured", "diverged", "unfinished"])
def test_a_page_has_no_fault(browser, pages, name):
    assert faults(browser, pages[name]) == set()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_colours_the_page_and_its_figures(browser, pages, scheme):
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(pages["measured"].as_uri())
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    dark = [int(ground[4:].split(",")[0]) < 128, int(ink[4:].split(",")[0]) > 128]
    assert dark == [scheme == "dark"] * 2


@pytest.mark.parametrize(
    "body, fault",
    [
        ("<p style='width: 2000px'>wide", "the page is 20"),
        ("<p style='width: 2000px'>wide", 'P "wide" leaves the window'),
        ("<p style='width: 50px; overflow: hidden'>unbreakable_words", "is wider than its box"),
        ("<p style='color: #ddd; background: #fff'>pale", "has little contrast"),
        ("<svg width=100 viewBox='0 0 400 100'><text y=50>a</text></svg>", "is small"),
        ("<svg width=400 viewBox='0 0 400 100'><text y=50 x=390>long</text></svg>", "leaves its figure"),
        ("<svg width=400 viewBox='0 0 400 100'><text y=50>one</text><text y=52>two</text></svg>", "overlaps"),
        ("<script>fail()</script>", "fail is not defined"),
        ("<img src='missing.png'>", "asks for file:"),
    ],
)
def test_a_planted_fault_is_found(browser, tmp_path, body, fault):
    page = tmp_path / "planted.html"
    page.write_text(f"<!doctype html><body style='background: #fff'>{body}", encoding="utf-8")
    found = faults(browser, page, [390])
    assert any(fault in sentence for sentence in found), found
