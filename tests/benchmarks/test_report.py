"""The report says what the ledger holds: the newest rows, the right figures, and nothing where nothing was measured."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"
BEGIN, END = "<!-- ledger:begin -->", "<!-- ledger:end -->"
DEVICE = "Made-up 1000, 80GB"  # no card has this name: nothing here was measured
FOLDER = "made-up-1000-80gb"
US = {"globe": 50.0, "globe_atomic": 45.0, "dense_twin": 80.0, "hf_eager": 400.0, "hf_grouped_mm": 75.0}
EARLY, LATE = "2030-01-01T00:00:00+00:00", "2030-01-02T00:00:00+00:00"


def row(provider: str, us: float, date: str = EARLY, **changes) -> dict:
    shape = {"hidden": 64, "intermediate": 32, "experts": 8, "choices": 2, "tokens": 4, "rank": 16}
    return {
        "op": "moe_ffn",
        "shape": shape | changes.pop("shape", {}),
        "provider": provider,
        "median_us": us,
        "p20_us": us,
        "p80_us": us,
        "gb_per_s": 40_000 / us,
        "tflop_per_s": 100 / us,
        "copy_share": 40 / us,
        "matmul_share": 1 / us,
        "relative_error": 0.00234,
        "copy_gb_per_s": 1000.0,
        "matmul_tflop_per_s": 100.0,
        "device": DEVICE,
        "commit": "abc1234",
        "torch": "2.0",
        "triton": "3.0",
        "date": date,
        "model": "olmoe",
    } | changes


def run_of(date: str = EARLY, scale: float = 1.0, **changes) -> list[dict]:
    """The rows of one number of tokens, every provider `scale` times as slow as in US."""
    return [row(name, scale * us, date, **changes) for name, us in US.items()]


def fit_row(provider: str, **changes) -> dict:
    names = ("device", "commit", "torch", "triton", "date", "model", "shape")
    own = {"op": "fit", "provider": provider, "seconds": 5.0, "bytes": 366, "settings": "5 steps"}
    own |= {"gate_error": 0.03, "up_error": 0.02, "gate_seconds_to_mobe": 1.5, "up_seconds_to_mobe": None}
    return {name: value for name, value in row("", 1.0).items() if name in names} | own | changes


def model_row(provider: str, us: float, **changes) -> dict:
    own = {"op": "model_decode", "settings": "3 repeats", "tokens_per_s": 4e6 / us, "ratio_to_dense": 500 / us}
    own |= {"predicted_us": 77.0, "resident_bytes": 1_250_000, "planned_bytes": 1_260_000}
    drop = ("gb_per_s", "tflop_per_s", "copy_share", "matmul_share", "copy_gb_per_s", "matmul_tflop_per_s")
    return {name: value for name, value in row(provider, us).items() if name not in drop} | own | changes


def curve_row(share: float, **changes) -> dict:
    own = {
        "op": "cache_curve",
        "tokens_per_s": 2000.0,
        "ratio_to_composed": 0.5,
        "hit_rate": 0.0,
        "warm_hit_rate": 0.25,
    }
    shape = {"hidden": 64, "layers": 2, "tokens": 1, "share": share}
    return model_row("zipf", 500.0) | own | {"shape": shape} | changes


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A README and an empty ledger, and what to do with them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from report import main

    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"# Title\n\nabove\n\n{BEGIN}\nold\n{END}\n\nbelow\n", encoding="utf-8")
    results.mkdir()

    def put(rows: list[dict], file: str = f"{FOLDER}/ffn.jsonl") -> Path:
        path = results / file
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in rows)
        return path

    def report(*arguments: str) -> str:
        """Runs the report; returns what it complains of before exit code 1."""
        options = ["--results", str(results), "--readme", str(readme)]
        monkeypatch.setattr(sys, "argv", ["report.py", *options, *arguments])
        try:
            main()
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "\n" not in stop.code  # printed; the exit code is 1
            return stop.code
        return ""

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    return SimpleNamespace(readme=readme, results=results, put=put, report=report, files=files)


def cells(text: str) -> list[list[str]]:
    """The lines of all tables."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0] != "---"]


def test_the_readme_of_the_repository_agrees_with_its_ledger(warm_python):
    done = warm_python.run(BENCHMARKS / "report.py", "--check")
    assert done.returncode == 0, done.stderr


def test_an_empty_ledger_leaves_no_section(place):
    assert not place.report()
    assert place.readme.read_text() == f"# Title\n\nabove\n\n{BEGIN}\n{END}\n\nbelow\n"
    assert list(place.files()) == ["README.md"]


def test_the_tables_hold_the_newest_rows(place):
    place.put(run_of(LATE, scale=2) + run_of(EARLY) + run_of(EARLY, shape={"tokens": 16}))
    assert not place.report()
    header, first, second = cells(place.readme.read_text())
    assert header[:5] == ["tokens", "strategy", "best other, us", "twin, us", "GloBE, us"] and header[-1] == "run"
    assert first == [
        "4",
        "composed",
        "hf_grouped_mm 150.0",
        "160.0",
        "100.0",
        "1.50x",
        "1.60x",
        "40",
        "1",
        "2.3e-03",
        LATE,
    ]
    assert second == [
        "16",
        "composed",
        "hf_grouped_mm 75.0",
        "80.0",
        "50.0",
        "1.50x",
        "1.60x",
        "80",
        "2",
        "2.3e-03",
        EARLY,
    ]
    for date in (EARLY, LATE):  # the conditions of both runs
        conditions = f"{DEVICE}, torch 2.0, triton 3.0, commit abc1234, {date}: copy 1000 GB/s, matmul 100.00 TFLOP/s."
        assert conditions in place.readme.read_text()


def test_a_line_compares_within_one_run(place):
    place.put([*run_of(EARLY), row("globe", 10.0, LATE)])
    place.report()
    (line,) = cells(place.readme.read_text())[1:]
    assert line[:7] == ["4", "composed", "-", "-", "10.0", "-", "-"]


def test_each_strategy_has_a_line(place):
    place.put([*run_of(), row("globe_bank_first", 40.0)])
    assert not place.report()
    _, composed, bank_first = cells(place.readme.read_text())
    assert [composed[1], *composed[4:7]] == ["composed", "50.0", "1.50x", "1.60x"]
    assert [bank_first[1], *bank_first[4:7]] == ["bank_first", "40.0", "1.88x", "2.00x"]


def test_the_ratio_is_that_of_the_benchmark(place, ffn_rows):
    rows = ffn_rows
    place.put(rows, "cpu/ffn.jsonl")
    assert not place.report()
    (globe,) = (each for each in rows if each["provider"] == "globe")
    header, line, bank_first = cells(place.readme.read_text())
    assert (line[1], bank_first[1]) == ("composed", "bank_first")
    shown = dict(zip(header, line, strict=True))
    assert shown["GloBE, us"] == f"{globe['median_us']:.1f}" and shown["twin, us"] == "-"
    assert shown["vs best"] == f"{globe['ratio_to_best']:.2f}x"
    assert shown["% copy"] == f"{100 * globe['copy_share']:.0f}"
    assert shown["% matmul"] == f"{100 * globe['matmul_share']:.0f}"
    assert shown["error"] == f"{globe['relative_error']:.1e}"
    assert (place.results / "cpu" / "roofline-qwen3-small.png").is_file()


def test_the_page_has_all_models_and_the_readme_those_of_the_newest_run(place):
    place.put(run_of(EARLY, shape={"rank": 8}) + run_of(EARLY, model="mixtral-8x7b") + run_of(LATE))
    compose = row("globe", 20.0, LATE, op="compose_basis", shape={"atoms": 5})
    del compose["shape"]["tokens"], compose["matmul_share"]
    place.put([compose], f"{FOLDER}/compose.jsonl")
    # what is no layer does not take the place of the layers, however new
    solves = row("globe", 20.0, "2030-01-03T00:00:00+00:00", op="batched_spd_solve", model="any")
    place.put([solves], f"{FOLDER}/spd.jsonl")
    assert not place.report()
    page, readme = (place.results / FOLDER / "README.md").read_text(), place.readme.read_text()
    assert f"(results/{FOLDER}/README.md)" in readme
    for text, count in ((page, 5), (readme, 2)):
        assert text.count("error |") == text.count(": copy 1000 GB/s") == count
        assert ["provider", "us", "GB/s", "% copy", "error"] in cells(text)
        assert ["globe", "20.0", "2000", "200", "2.3e-03"] in cells(text)
    for name in ("roofline-olmoe.png", "roofline-mixtral-8x7b.png"):
        image = (place.results / FOLDER / name).read_bytes()
        width, height = (int.from_bytes(image[at : at + 4]) for at in (16, 20))
        assert image[:8] == b"\x89PNG\r\n\x1a\n" and 600 < width < 2000 and 400 < height < 1500 and len(image) > 10_000
        assert f"]({name})" in page


def test_fits_are_on_the_page_only(place):
    place.put([fit_row("globe"), fit_row("svd", kl=0.0579)], f"{FOLDER}/fit.jsonl")
    assert not place.report()
    assert f"{BEGIN}\n{END}" in place.readme.read_text()
    page = (place.results / FOLDER / "README.md").read_text()
    _, globe, svd = cells(page)
    assert globe == ["globe", "0.0300", "0.0200", "5.0", "1.5", "-", "366", "-", "-", "-"]
    assert svd[0] == "svd" and svd[-2] == "0.05790"
    assert f"{DEVICE}, torch 2.0, triton 3.0, commit abc1234, {EARLY}: 5 steps." in page
    place.put(run_of())
    assert not place.report()
    text = place.readme.read_text()
    assert f"{BEGIN}\n## Speed\n" in text and "`moe_ffn`" in text and "`fit`" not in text


def test_fits_of_several_seeds(place):
    """Mean and standard deviation of the runs that are alike; the newest run of a seed counts."""
    alike = {"settings": "9 steps", "share_of_experts": 0.5, "perplexity2": 2.0}
    rows = [
        fit_row("globe", gate_error=0.9),
        *(fit_row("globe", date=LATE, seed=seed, gate_error=0.01 * (seed + 1), **alike) for seed in (0, 1, 2)),
        fit_row("globe", seed=7, settings="5 steps"),
        fit_row("int8", gate_error=4.46e-5, up_error=0),
        fit_row("reap", kept=0.7, bytes=77),
    ]
    rows[-1] = {name: value for name, value in rows[-1].items() if not name.endswith("_error")}
    place.put(rows, f"{FOLDER}/fit.jsonl")
    assert not place.report()
    header, globe, int8, reap = cells((place.results / FOLDER / "README.md").read_text())
    assert header[6:8] == ["bytes", "of experts"] and header[-2:] == ["perplexity, text 2", "run"]
    assert globe[:4] == ["globe, 3 seeds", "0.0200 ± 0.0100", "0.0200", "5.0"]
    assert globe[6:8] == ["366", "0.500"] and globe[-2] == "2.00"
    assert int8[:3] == ["int8", "4.5e-05", "0.0000"]
    assert reap[:4] == ["reap", "-", "-", "5.0"] and reap[6:8] == ["77", "-"]


def test_whole_models(place):
    rows = [model_row("dense", 500.0, implementation="grouped_mm"), model_row("cached_10%", 250.0, hit_rate=0.5)]
    place.put(rows, f"{FOLDER}/model.jsonl")
    place.put([curve_row(10.0), curve_row(50.0, hit_rate=0.75)], f"{FOLDER}/model.jsonl")
    assert not place.report()
    page, readme = (place.results / FOLDER / "README.md").read_text(), place.readme.read_text()
    small, large = (
        ["zipf", share, hits, "0.250", "500", "2000", "0.50x"] for share, hits in (("10", "0.000"), ("50", "0.750"))
    )
    dense = ["4", "dense grouped_mm", "8000", "1.00x", "500", "77", "1.25", "1.26", "-", "2.3e-03"]
    cached = ["4", "cached_10%", "16000", "2.00x", "250", "77", "1.25", "1.26", "0.50", "2.3e-03"]
    found = cells(page)
    assert [line for line in found if line[0] in ("4", "zipf")] == [small, large, dense, cached]
    assert f"commit abc1234, {EARLY}: 3 repeats." in page
    assert "`model_decode`" in readme and "`cache_curve`" not in readme
    place.put([row | {"device": "cpu"} for row in rows], "cpu/model.jsonl")
    place.report()
    assert "**cpu**" not in place.readme.read_text(), "no kernel ran there"


def test_nothing_else_changes_and_a_second_run_changes_nothing(place):
    place.put(run_of())
    place.report()
    text, files = place.readme.read_text(), place.files()
    assert text.startswith(f"# Title\n\nabove\n\n{BEGIN}\n") and text.endswith(f"\n{END}\n\nbelow\n")
    assert "old" not in text
    assert not place.report() and place.files() == files


def test_the_readme_stays_short(place):
    place.readme.write_text("line\n" * 115 + f"{BEGIN}\n{END}\n")
    for number in range(6):
        tokens = [each for count in (1, 4, 16) for each in run_of(device=f"{DEVICE} {number}", shape={"tokens": count})]
        place.put(tokens, f"{number}.jsonl")
    assert not place.report()
    text = place.readme.read_text()
    assert 130 < len(text.splitlines()) < 150 and text.count("all tables and rooflines") == 6


def test_check(place):
    place.put(run_of())
    stale, files = place.report("--check"), place.files()
    assert "README.md differs from the ledger" in stale
    assert list(files) == list(place.files()) and b"old" in files["README.md"]
    place.report()
    assert not place.report("--check")
    place.readme.write_text(place.readme.read_text().replace("50.0", "49.0"))
    assert place.report("--check")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("<<<<<<< HEAD", "is not JSON"),
        ("[]", "a sound object"),
        (json.dumps({name: value for name, value in row("globe", 1.0).items() if name != "commit"}), "sound commit;"),
        (json.dumps(row("globe", 1.0, relative_error=float("nan"))), "sound relative_error;"),
        (json.dumps(row("globe", 1.0, median_us=0)), "sound median_us;"),
        (json.dumps(row("globe", 1.0) | {"shape": {}}), "sound shape.tokens;"),
        (json.dumps(model_row("auto", 1.0, tokens_per_s=0, planned_bytes=None)), "sound tokens_per_s, planned_bytes;"),
        (json.dumps(model_row("auto", 1.0) | {"shape": {}}), "sound shape.tokens;"),
        (json.dumps(curve_row(0, hit_rate=-0.1)), "sound hit_rate, shape.share;"),
        (json.dumps(fit_row("globe", up_error=None, seconds=0)), "sound seconds, up_error;"),
        (json.dumps(fit_row("reap", up_error=None, kept=0)), "sound kept;"),
    ],
)
def test_a_damaged_line_is_named(place, line, complaint):
    path = place.put(run_of())
    with path.open("a") as file:
        file.write(line + "\n")
    files = place.files()
    complained = place.report()
    assert f"line {len(US) + 1} of {path}" in complained and complaint in complained
    assert place.files() == files


def test_markers_that_are_missing_are_named(place):
    place.readme.write_text("# Title\n")
    assert BEGIN in place.report() and place.readme.read_text() == "# Title\n"
