"""The report of a benchmark run, the README's tables, and the comparison of two runs."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anyup.bench import stored
from anyup.bench.report import formatting, modelled, plots
from anyup.bench.report import page as report_page
from benchmarks import compare, report

MACHINE = {
    "device": "Abacus <9>", "device_kind": "cpu", "threads": 2, "torch": "2.13.0", "triton": "3.9.0", "anyup": "0.1.0",
    "commit": "0123456789ab", "matmul_rate": 2.0e11, "matmul_rate_after": 2.1e11, "copy_bandwidth": 4.5e10,
}  # fmt: skip


def row(workload: str, backend: str = "anyup", **more: Any) -> dict[str, Any]:
    """A row of the whole model."""
    size, grid = (int(number) for number in workload.split(",")[0].split(" from "))
    made = {
        "group": "model", "workload": workload, "size": [size, size], "grid": [grid, grid], "channels": 384,
        "batch": 1, "operation": "model", "backend": backend, "dtype": "float32", "pass": "forward", "status": "ok",
        "reason": None, "output_bytes": 4 * 384 * size**2, **more,
    }  # fmt: skip
    return {"id": "/".join(str(made[name]) for name in ("group", "operation", "workload", "backend", "pass")), **made}


def timed(seconds: float, spread: float = 0.1, **more: Any) -> dict[str, Any]:
    """Three repeats."""
    half = seconds * spread / 2
    return {"seconds": seconds, "spread": spread, "times": [seconds - half, seconds, seconds + half], **more}


def planted() -> dict[str, Any]:
    """Results with every status and every note."""
    ours = {"floor_seconds": 0.2, "times_floor": 1.15, "peak_bytes": 304_852_992, "peak_is_exact": True}
    rows = [
        row("224 from 16", **timed(0.23), **ours, speed_up=2.7251, difference=6e-5),
        row("448 from 32", **timed(0.705, 0.3), **ours, busy=True, speed_up=8.0609, difference=0.0),
        row("1024 from 64", **timed(5.2), floor_seconds=3.9, times_floor=1.33, peak_bytes=2.4e9, peak_is_exact=False),
        row("224 from 16", "published", **timed(0.603), chunk=1024, chunk_times={"512": 0.2, "1024": 0.1}),
        row("448 from 32", "published", seconds=5.68, spread=None, times=[5.68], chunk=None, peak_bytes=1.08e9),
        row("1024 from 64", "published", status="over budget", reason="would take 110 s", expected_seconds=110.5),
        row("448 from 32", "published, unchunked", status="out of memory", reason="needs 4 GB & more"),
        row("448 from 32", "triton", group="operation", operation="window_attention", status="unsupported",
            reason="no card: <script>"),
        row("448 from 32", group="stages", **timed(0.7), stages={"image encoder": 0.3, "window attention": 0.4}),
        row("448 from 32", group="head", operation="head_before", **timed(0.0123), machine={"commit": "fedcba987654"}),
    ]  # fmt: skip
    return {"format": 1, "machine": dict(MACHINE), "rows": rows}


class Page(HTMLParser):
    """What stands in a report: cells by row id, text, attributes that would fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[str | None, str]]] = {}
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.script = ""
        self._row: list[tuple[str | None, str]] | None = None
        self._in: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.fetched += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]
        if tag == "tr":
            identity = found.get("data-id")
            self._row = self.rows.setdefault(identity.removeprefix("row-"), []) if identity else None
        if tag == "td" and self._row is not None:
            self._row.append((found.get("data-value"), ""))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr":
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.script += data
        elif self._row:
            value, text = self._row[-1]
            self._row[-1] = (value, text + data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report_page.write_report(planted(), path, codegen=[])
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


# The page


def test_the_page_s_numbers_are_the_stored_ones(written: tuple[str, Page]) -> None:
    results, (_, page) = planted(), written
    assert json.loads(page.script) == results
    assert set(page.rows) == {one["id"] for one in results["rows"]}
    for one in results["rows"]:
        values = [value for value, _ in page.rows[one["id"]] if value is not None]
        for name in ("seconds", "spread", "floor_seconds", "times_floor", "peak_bytes", "speed_up", "difference"):
            if one.get(name) is not None:
                assert json.dumps(one[name]) in values, (one["id"], name)
        for seconds in one.get("stages", {}).values():
            assert json.dumps(seconds) in values


def test_what_people_read_is_the_stored_number_rounded(written: tuple[str, Page]) -> None:
    cells = dict(written[1].rows["model/model/448 from 32/anyup/forward"])
    assert (cells["0.705"], cells["304852992"], cells["8.0609"]) == ("0.705 s", "305 MB", "8.1x")
    assert cells["0.3"] == "30 %"


@pytest.mark.parametrize(
    ("identity", "note"),
    [
        ("model/model/1024 from 64/published/forward", "over budget would take 110 s; expected 110 s, by an estimate"),
        ("model/model/448 from 32/published, unchunked/forward", "out of memory needs 4 GB & more"),
        ("operation/window_attention/448 from 32/triton/forward", "unsupported no card: <script>"),
        ("model/model/448 from 32/anyup/forward", "busy machine "),
        ("model/model/1024 from 64/anyup/forward", "peak is an upper bound"),
        ("model/model/224 from 16/published/forward", "chunks of 1024, the best of 2 tried"),
        ("model/model/448 from 32/published/forward", "run once"),
        ("head/head_before/448 from 32/anyup/forward", "another run: commit fedcba987654"),
    ],
)
def test_a_row_says_what_became_of_it(identity: str, note: str, written: tuple[str, Page]) -> None:
    assert written[1].rows[identity][-1][1] == note


def test_the_page_needs_no_other_file_and_names_the_machine(written: tuple[str, Page]) -> None:
    text, page = written
    assert page.fetched == [] and "@import" not in text and "url(http" not in text
    assert "Abacus &lt;9&gt;, 2 threads, torch 2.13.0, triton 3.9.0, anyup 0.1.0, commit 0123456789ab" in text
    assert text.count("<svg") == 4 and len(page.ids) == len(set(page.ids))
    assert "1 of 10 rows were measured while the machine was busy" in text
    assert "No code generation report here" in text


def test_pictures_have_the_page_s_colours_alone(written: tuple[str, Page]) -> None:
    text = "".join(re.findall(r"<svg.*?</svg>", written[0], flags=re.DOTALL))
    assert not [colour for colour in (plots.INK, plots.GRID, plots.PAGE, *plots.SERIES) if colour in text]
    names = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert names and all(written[0].count(f"{name}:") == 2 for name in names)  # light and dark


def test_the_same_results_give_the_same_page(written: tuple[str, Page], tmp_path: Path) -> None:
    report_page.write_report(planted(), tmp_path / "again.html", codegen=[])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written[0]


def test_curves_are_of_one_grid_a_size_and_of_what_most_rows_are() -> None:
    results = planted()
    others = [row("448 from 28"), row("448 from 28", "published"), row("336 from 24", dtype="float16")]
    results["rows"] += [{**one, "id": f"other {number}"} for number, one in enumerate(others)]
    found = {backend: [one["workload"] for one in rows] for backend, rows in plots.curves(results).items()}
    sizes = ["224 from 16", "448 from 32", "1024 from 64"]
    assert found == {"anyup": sizes, "published": sizes, "published, unchunked": ["448 from 32"]}
    assert plots.curves({**results, "rows": results["rows"][:1]}) == {}


def test_modelled_figures_are_called_so(tmp_path: Path) -> None:
    kernel = {"kernel": "window_attention_forward", "target": "90", "dtype": "bfloat16", "workload": "448 from 32"}
    report_page.write_report(
        {**planted(), "rows": []}, tmp_path / "r.html",
        codegen=[{**kernel, "device": "H100", "floor_us": 100.0, "modelled_us": 150.0}, {**kernel, "target": "gfx942"}],
    )  # fmt: skip
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Modelled, not measured." in text and "<td class=number>1.50</td>" in text and "All 2 rows" in text


def test_the_checkout_s_codegen_rows_are_found() -> None:
    rows = modelled.stored_rows()
    if not modelled.STORED.exists():
        pytest.skip("no checkout")
    assert rows is not None and len(rows) > 100
    assert modelled.stored_rows(Path("nowhere.json")) is None


def test_without_matplotlib_nothing_is_written_and_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install matplotlib"):
        report_page.write_report(planted(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def _broken(**changes: Any) -> dict[str, Any]:
    return {**planted(), **changes}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "expected results of `anyup bench`, an object"),
        ({"parts": {}}, "expected results of `anyup bench`, an object"),
        (_broken(format=2), "format: expected 1, got 2"),
        (_broken(machine=None), "expected an object `machine` and a list `rows`"),
        (_broken(rows=[3]), "row 0: expected an object, got 3"),
        (_broken(rows=[{**row("448 from 32"), "backend": None}]), "row 0: backend: expected a text, got None"),
        (
            _broken(rows=[row("448 from 32", status="fine")]),
            r"row 0 \(.*\): status: expected one of ok, .*, got 'fine'",
        ),
        (_broken(rows=[row("448 from 32", seconds=-1)]), "seconds: expected a positive number or null, got -1"),
        (_broken(rows=[row("448 from 32")] * 2), "two rows have the id"),
    ],
)
def test_what_is_no_result_is_refused_by_name(results: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=message) as raised:
        stored.read(path)
    assert str(raised.value).startswith(str(path))
    with pytest.raises(ValueError, match=message):
        report_page.write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_results_in_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(OSError, match="expected a regular file, this is a named pipe"):
        stored.read(tmp_path / "results.json")


def test_the_command_makes_a_page_of_stored_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, page, codegen = tmp_path / "results.json", tmp_path / "page.html", tmp_path / "codegen.json"
    codegen.write_text("[]")
    source.write_text(json.dumps(planted()))
    assert report_page.main([str(source), "-o", str(page), "--codegen", str(codegen)]) == 0
    assert page.exists() and capsys.readouterr().out == f"{page}\n"
    source.write_text("{")
    assert report_page.main([str(source), "-o", str(page)]) == 2
    assert f"{source}: expected results of `anyup bench`, this is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (110.4, "110 s"),
        (0.705, "0.705 s"),
        (0.0787, "78.7 ms"),
        (1.5e-4, "0.150 ms"),
        (8.3e-5, "83.0 µs"),
        (9.999, "10.0 s"),
    ],
)
def test_seconds_have_three_digits(value: float, text: str) -> None:
    assert formatting.seconds(value) == text


# The README's tables


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_a_page_s_tables_are_the_stored_results(path: Path) -> None:
    if not path.exists():
        pytest.skip("the documentation is not here")
    text = path.read_text(encoding="utf-8")
    assert report.page(text) == text, "run python -m benchmarks.report --write"


def test_the_pages_take_their_measured_numbers_from_the_stored_results() -> None:
    if not all(page.exists() for page in report.PAGES):
        pytest.skip("the documentation is not here")
    readme, benchmarks, evaluation, card = (
        {f"{found['file']}/{found['name']}" for found in report._PLACE.finditer(path.read_text(encoding="utf-8"))}
        for path in report.PAGES
    )
    assert card >= {"anyup_mini/card"}
    assert readme == {"cpu/summary", "cpu/machine", "cpu/speed-up-448", "cpu/speed-up-1024"}
    assert benchmarks >= {"cpu/model", "cpu/curve", "cpu/head", "cpu/unification", "cpu/machine", "model/forward"}
    assert evaluation >= {
        "nyuv2_segmentation/probes",
        "nyuv2_depth/probes",
        "replica_normals/probes",
        "features/features",
    }


def test_tables_follow_the_stored_numbers(tmp_path: Path) -> None:
    results = planted()
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    place = (
        "in <!-- benchmarks: cpu/speed-up-448 --><!-- end --> words\n<!-- benchmarks: cpu/model -->old\n<!-- end -->\n"
    )
    text = report.page(place, tmp_path)
    assert text.startswith("in <!-- benchmarks: cpu/speed-up-448 -->8 times<!-- end --> words\n")
    assert "| 448 from 32 | 0.705 s | 0.599 s to 0.811 s | 5.68 s, once (unchunked) |  | 8.1x | 1.15 |" in text
    assert "| 1024 from 64 | 5.20 s | 4.94 s to 5.46 s | over budget |" in text
    assert "| 448 from 32 | 0.705 s | 5.68 s, once | 8.1x |" in report.made("cpu", "summary", tmp_path)
    assert report.page(text, tmp_path) == text
    results["rows"][1]["seconds"] = 0.9
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    assert report.page(text, tmp_path) != text


def test_stages_are_told_as_shares_and_large_images_with_what_was_planned(tmp_path: Path) -> None:
    results = planted()
    large = {"peak_bytes": 1.31e9, "predicted_bytes": 1.4e9, "processor_seconds": 90.0, "microseconds_per_pixel": 21.46}
    results["rows"].append(row("2048 from 128", group="high-resolution", operation="head", kept="nothing", **large))
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    names = ("stages", "high-resolution")
    text = report.page("\n".join(f"<!-- benchmarks: cpu/{name} --><!-- end -->" for name in names), tmp_path)
    assert "| 448 from 32 | 43% | 57% |" in text
    assert "| 2048 from 128 | head | 1.31 GB | 1.40 GB | 90 s | 21.5 | nothing |" in text


def test_tables_of_evaluations_name_weights_as_code_and_show_the_spread(tmp_path: Path) -> None:
    methods = {"bilinear": {"kind": "interpolation"}, "ours": {"kind": "weights"}}
    probes = {
        "evaluation": "segmentation",
        "methods": methods,
        "results": {
            name: {"miou": {"mean": mean, "std": 0.01}, "accuracy": {"mean": 0.5, "std": 0.0}}
            for name, mean in (("bilinear", 0.1234), ("ours", 0.2))
        },
        "losses": [{"bilinear": [9.0], "ours": [9.0]}, {"bilinear": [1.0, 2.0], "ours": [0.5, 0.5]}],
    }
    of_task = {
        name: {"relative": {"ratio": ratio, "better": better}}
        for name, ratio, better in (("bilinear", 1.0, 0.0), ("ours", 0.9514, 2 / 3))
    }
    features = {"evaluation": "features", "methods": methods, "encoders": {"net:3": {"2x": {"methods": of_task}}}}
    (tmp_path / "a.json").write_text(json.dumps(probes))
    (tmp_path / "b.json").write_text(json.dumps(features))
    made = report.made("a", "probes", tmp_path)
    assert "| method | mIoU, % | pixel accuracy, % | training loss |" in made
    assert "| bilinear | 12.34 ± 1.00 | 50.00 ± 0.00 | 1.5000 |" in made and "| `ours` | 20.00 ± 1.00 |" in made
    made = report.made("b", "features", tmp_path)
    assert "| encoder | task | `ours` |" in made and "| `net:3` | 2x | 0.951 |" in made
    made = report.made("b", "card", tmp_path)
    assert "| encoder | 2x | better on |" in made and "| `net:3` | 0.951 | 67% |" in made


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("cpu/modell", "cpu/modell: expected one of summary, model, "),
        ("gpu/model", "gpu/model: there is no "),
        ("cpu/unification", "no stored row for the table of feature unification alone"),
    ],
)
def test_a_place_without_numbers_is_refused(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(planted()))
    with pytest.raises(ValueError, match=message):
        report.page(f"<!-- benchmarks: {place} -->\n<!-- end -->", tmp_path)


# Comparing two runs


def changed(number: int, **changes: Any) -> dict[str, Any]:
    """The planted results with one row changed."""
    results = copy.deepcopy(planted())
    results["rows"][number].update(changes)
    return results


def test_equal_runs_have_no_regression() -> None:
    found = compare.compare(planted(), planted())
    assert (found.regressions, found.gains, found.notes, found.unchanged) == ([], [], [], 10)


@pytest.mark.parametrize(
    ("number", "factor", "regressed"),
    [
        (0, 1.2, True),  # spread 10 %
        (0, 1.09, False),
        (1, 1.2, False),  # spread 30 %
        (1, 1.4, True),
        (4, 1.1, False),  # run once
        (4, 1.2, True),
    ],
)
def test_a_time_regresses_beyond_the_spread_and_not_within(number: int, factor: float, regressed: bool) -> None:
    seconds = planted()["rows"][number]["seconds"]
    found = compare.compare(planted(), changed(number, seconds=factor * seconds))
    assert (len(found.regressions), len(found.gains)) == (int(regressed), 0)
    if regressed:
        assert f"({factor - 1:+.0%}, spread" in found.regressions[0]
    back = compare.compare(changed(number, seconds=factor * seconds), planted())
    assert (len(back.regressions), len(back.gains)) == (0, int(regressed))


def test_the_wider_spread_of_the_two_runs_counts() -> None:
    assert compare.compare(planted(), changed(0, seconds=0.23 * 1.2, spread=0.4)).regressions == []


def test_peak_memory_regresses_where_it_is_exact() -> None:
    found = compare.compare(planted(), changed(0, peak_bytes=304_852_992 * 1.2))
    assert found.regressions == ["model/model/224 from 16/anyup/forward: peak memory 305 MB before, 366 MB now (+20%)"]
    assert compare.compare(planted(), changed(0, peak_bytes=304_852_992 * 1.04)).regressions == []
    assert compare.compare(planted(), changed(2, peak_bytes=9e9)).regressions == []  # an upper bound


def test_the_time_of_the_host_regresses_beside_the_card_s() -> None:
    before = changed(0, host_seconds=4.5e-3)
    assert compare.compare(before, changed(0, host_seconds=6e-3)).regressions == [
        "model/model/224 from 16/anyup/forward: host time 4.50 ms before, 6.00 ms now (+33%)"
    ]
    assert len(compare.compare(before, changed(0, host_seconds=0.6e-3)).gains) == 1
    assert compare.compare(before, changed(0, host_seconds=5e-3)).unchanged == 10
    assert compare.compare(planted(), before).regressions == []


def test_what_does_not_run_any_more_is_a_regression() -> None:
    gone = changed(0, status="out of memory", reason="needs 3 GB", seconds=None, peak_bytes=None)
    (line,) = compare.compare(planted(), gone).regressions
    assert line == "model/model/224 from 16/anyup/forward: ok before, out of memory now (needs 3 GB)"
    assert len(compare.compare(gone, planted()).gains) == 1
    other = compare.compare(planted(), changed(6, status="over budget"))
    assert other.regressions == [] and len(other.notes) == 1


def test_rows_of_one_file_alone_are_named() -> None:
    fewer = planted()
    del fewer["rows"][0]
    found = compare.compare(planted(), fewer)
    assert found.notes == ["only in the old file: model/model/224 from 16/anyup/forward"] and not found.regressions
    assert compare.compare(fewer, planted()).notes == ["only in the new file: model/model/224 from 16/anyup/forward"]


def test_times_of_two_machines_are_compared_as_multiples_of_the_floor() -> None:
    other = planted()
    other["machine"].update(device="Slide rule", matmul_rate=1.0e11)
    for one in other["rows"]:
        if one.get("seconds"):
            one["seconds"] *= 2  # half as fast, and so are its products
    found = compare.compare(planted(), other)
    assert found.regressions == [] and found.gains == []
    assert found.notes[0].startswith(
        "machines differ (device Abacus <9> and Slide rule, matrix products at 200 and 100"
    )
    other["rows"][0]["times_floor"] *= 1.5
    (line,) = compare.compare(planted(), other).regressions
    assert "time 1.15 floors before, 1.72 floors now (+50%" in line
    del other["rows"][0]["times_floor"]  # then by the rates: the same 46 GFLOP
    assert compare.compare(planted(), other).regressions == []
    other["rows"][0]["seconds"] *= 2
    (line,) = compare.compare(planted(), other).regressions
    assert "time 46 GFLOP of a matrix product before, 92 GFLOP of a matrix product now" in line


def test_the_command_s_exit_status_says_whether_something_regressed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(planted()))
    new.write_text(json.dumps(changed(0, seconds=0.5)))
    assert compare.main([str(old), str(new)]) == 1
    assert capsys.readouterr().out.endswith("1 regressions, 0 gains, 9 rows unchanged\n")
    assert compare.main([str(new), str(old)]) == 0
    new.write_text("[]")
    assert compare.main([str(old), str(new)]) == 2
    assert f"{new}: expected results" in capsys.readouterr().err
    assert compare.main([str(old), str(tmp_path / "none.json")]) == 2
