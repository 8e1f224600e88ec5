"""The page in a real browser, with every request refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midge.profiles.compare import select, summarize
from midge.profiles.report import write_report
from midge.profiles.where import parse_where

Json = dict[str, Any]
Open = Callable[..., Any]

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<script>alert(1)</script>"
KNN = {
    name: {"top1": correct / 10_000, "n": 10_000, "correct": correct}
    for name, correct in {"pixels": 8012, "random_init": 7711, "pretrained": 8433}.items()
}
RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Write a report and open it; on the way out no request but the page itself and no complaint may have occurred."""
    requests: list[str] = []
    complaints: list[str] = []
    contexts: list[Any] = []
    path = tmp_path / "report.html"

    def open_it(
        records: list[Json], summary: Json, width: int = 1280, title: str = "quickstart", **options: Any
    ) -> Any:
        write_report(path, records, summary, title, {"Training images": "60,000"})
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert requests == [path.as_uri()] * len(contexts)
    assert complaints == []


def visible_points(page: Any) -> list[Any]:
    return [point for point in page.query_selector_all("svg.scatter g.point") if point.is_visible()]


def milliseconds(value: float) -> str:
    """Three significant digits, re-derived: as many decimals as the magnitude asks for, at most four."""
    for decimals, from_value in enumerate((100, 10, 1, 0.1)):
        if value >= from_value:
            return f"{value:.{decimals}f}"
    return f"{value:.4f}"


def with_interval(value: float | None, interval: list[float] | None, show: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    return f"{show(value)}\n{show(interval[0])}–{show(interval[1])}" if interval else show(value)


def expected_cells(row: Json) -> list[str]:
    def percent(value: float) -> str:
        return f"{value * 100:.2f}"

    return [
        RUNTIMES[row["runtime"]],
        str(row["threads"]),
        with_interval(row["top1"], row["top1_ci95"], percent),
        with_interval(row["p50_ms"], row["p50_ci95"], milliseconds),
        milliseconds(row["p90_ms"]),
        f"{row['int8_mac_share'] * 100:.1f}",
        f"{row['peak_rss_mib']:.0f}",
        f"{row['size_bytes'] / 1e6:.2f}",
        "yes" if row["valid"] else "no: " + "; ".join(row["invalid_reasons"]),
    ]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_every_row_and_tells_the_summary(
    open_report: Open, make_records: Callable[..., list[Json]], width: int
) -> None:
    records = make_records()
    records[3].update(valid=False, invalid_reasons=["throttled", "too few runs"])
    summary = summarize(records, KNN)
    page = open_report(records, summary, width)
    assert len(visible_points(page)) == len(summary["rows"]) == 6
    rows = page.query_selector_all("#measurements tbody tr")
    assert [row.query_selector(".name").inner_text() for row in rows] == [row["variant"] for row in summary["rows"]]
    for row, data in zip(rows, summary["rows"], strict=True):
        cells = [cell.inner_text().replace("\n\n", "\n") for cell in row.query_selector_all("td")]
        assert cells == expected_cells(data)
        assert (row.query_selector(".chip") is not None) == data["pareto"]
    leads = [lead.inner_text().replace("\u00a0", " ") for lead in page.query_selector_all(".lead p")]
    assert leads == summary["headline"]
    verdicts = page.query_selector_all(".verdicts li")
    assert len(verdicts) == len(summary["verdicts"])
    for shown, verdict in zip(verdicts, summary["verdicts"], strict=True):
        text = shown.inner_text().replace("\u00a0", " ")
        assert verdict["verdict"] in text and verdict["text"] in text
    if width == 1280:
        assert page.evaluate("(t => t.scrollWidth <= t.clientWidth)(document.querySelector('.scroll'))")
    fits = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert fits, "the page scrolls sideways"


def test_points_and_whiskers_stand_where_the_numbers_say(
    open_report: Open, make_records: Callable[..., list[Json]]
) -> None:
    records = make_records("torch-fp32", "onnx-fp32", "openvino-int8")
    summary = summarize(records)
    page = open_report(records, summary)
    marks = page.query_selector_all("svg.wide g.point")
    xs = [float(m.query_selector("g").get_attribute("transform")[10:].split()[0]) for m in marks]
    logs = [math.log(row["p50_ms"]) for row in summary["rows"]]
    assert (xs[1] - xs[0]) / (logs[1] - logs[0]) == pytest.approx((xs[2] - xs[1]) / (logs[2] - logs[1]), rel=0.01)
    pixels_per_log = (xs[1] - xs[0]) / (logs[1] - logs[0])
    for mark, row, x in zip(marks, summary["rows"], xs, strict=True):
        whisker = mark.query_selector("line.whisker")
        ends = [float(whisker.get_attribute(name)) for name in ("x1", "x2")]
        wanted = [x + pixels_per_log * math.log(end / row["p50_ms"]) for end in row["p50_ci95"]]
        assert ends == pytest.approx(wanted, abs=0.5)
        assert len(mark.query_selector_all("line.whisker")) == 2


def test_the_knn_bars_have_their_lengths_and_intervals(
    open_report: Open, make_records: Callable[..., list[Json]]
) -> None:
    records = make_records("onnx-fp32")
    page = open_report(records, summarize(records, KNN))
    bars = page.query_selector_all(".bars .bar")
    assert len(bars) == 3
    assert [bar.query_selector("span").inner_text() for bar in bars] == [
        "Raw pixels",
        "Random initialization",
        "Pretrained",
    ]
    for bar, accuracy in zip(bars, KNN.values(), strict=True):
        track, fill = (bar.query_selector(f"rect.{name}").bounding_box() for name in ("track", "fill"))
        assert fill["width"] / track["width"] == pytest.approx(accuracy["top1"], abs=0.003)
    assert "84.33\u00a0% (83.60–85.03)" in bars[2].inner_text()


def test_without_knn_or_verdicts_their_sections_are_absent(
    open_report: Open, make_records: Callable[..., list[Json]]
) -> None:
    records = make_records("onnx-fp32")
    page = open_report(records, summarize(records))
    headings = [heading.inner_text() for heading in page.query_selector_all("h2")]
    assert headings == [
        "Accuracy against latency",
        "Measurements",
        "Start-up and agreement with the reference",
        "How it was measured",
    ]


def test_rows_without_accuracy_are_drawn_apart(open_report: Open, make_records: Callable[..., list[Json]]) -> None:
    records = make_records()
    for record in records:
        record["accuracy"] = {"top1": None, "reason": "the images have no labels"}
    page = open_report(records, summarize(records))
    points = visible_points(page)
    assert len(points) == 6
    assert all(point.query_selector("title").text_content().endswith("no accuracy") for point in points)
    assert "the images have no labels" in page.inner_text("main")


def test_strings_of_records_are_text_and_nothing_else(
    open_report: Open, make_records: Callable[..., list[Json]]
) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8", artifact=HOSTILE, device=f'"><img src=http://x.test/{HOSTILE}')
    records += make_records("onnx-fp32", artifact="' onload='alert(2)")
    for record in records:
        record["runtime_version"] = "</style><link rel=stylesheet href=http://x.test/a.css>"
        record["device"]["cpu_model"] = "<iframe src=http://x.test></iframe>"
        record["placement"]["ops"] = {"<b>Conv</b>": 1}
        record["protocol"]["name"] = "{{ 7 * 7 }}"
    records[1].update(valid=False, invalid_reasons=["<svg onload=alert(3)>"])
    page = open_report(records, summarize(records), title=f"</title>{HOSTILE}")
    assert page.query_selector_all("script, iframe, img, link, main style") == []
    assert page.title() == f"</title>{HOSTILE}"
    text = page.text_content("main")
    for harmless in (
        HOSTILE,
        "<iframe src",
        "<b>Conv</b>",
        "{{ 7 * 7 }}",
        "<svg onload=alert(3)>",
        "' onload='alert(2)",
    ):
        assert harmless in text
    assert len(visible_points(page)) == 3


def test_many_rows_are_numbered_as_in_the_table(open_report: Open, make_records: Callable[..., list[Json]]) -> None:
    records = [record for threads in (1, 2, 4) for record in make_records(threads=threads)]
    page = open_report(records, summarize(records))
    labels = [point.query_selector("text").text_content() for point in visible_points(page)]
    numbers = [cell.inner_text() for cell in page.query_selector_all("#measurements .no")]
    assert labels == numbers == [str(i) for i in range(1, 19)]


def test_it_says_which_rows_a_condition_kept(open_report: Open, make_records: Callable[..., list[Json]]) -> None:
    records = make_records()
    text = "p50_ms < 0.5"
    summary = select(summarize(records), text, parse_where(text))
    page = open_report(records, summary)
    assert len(visible_points(page)) == 2
    assert "Only the rows that satisfy p50_ms < 0.5: 2 of 6." in page.inner_text("main")
    nothing = select(summarize(records), "p50_ms < 0", parse_where("p50_ms < 0"))
    page = open_report(records, nothing)
    assert visible_points(page) == []
    assert "No row satisfies the condition." in page.inner_text(".lead")


def test_dark_and_light_differ_and_both_are_legible(open_report: Open, make_records: Callable[..., list[Json]]) -> None:
    records = make_records()
    summary = summarize(records, KNN)
    pages = {scheme: open_report(records, summary, color_scheme=scheme) for scheme in ("light", "dark")}
    grounds = {scheme: luminance(style(page, "body", "backgroundColor")) for scheme, page in pages.items()}
    assert grounds["light"] > 0.9 and grounds["dark"] < 0.05
    for scheme, page in pages.items():
        for selector in ("h1", ".where", "td", ".ci", ".badge.good", ".badge.open", ".chip"):
            assert contrast(luminance(style(page, selector, "color")), grounds[scheme]) >= 4.5, (scheme, selector)
        for label in ("torch", "onnxruntime", "openvino"):
            colour = style(page, f".label.{label}", "fill")
            assert contrast(luminance(colour), grounds[scheme]) >= 4.5, (scheme, label)


def style(page: Any, selector: str, name: str) -> str:
    return page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{name}")


def luminance(colour: str) -> float:
    """WCAG relative luminance of an ``rgb(r, g, b)``."""
    channels = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_the_page_is_small_and_the_same_for_the_same_records(
    tmp_path: Path, make_records: Callable[..., list[Json]]
) -> None:
    records = make_records()
    for name in ("a", "b"):
        write_report(tmp_path / name / "report.html", records, summarize(records, KNN), "quickstart")
    first, second = (tmp_path / name / "report.html" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 100_000
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]
