"""The page of studies: its record by hand, and the page itself in a real browser."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import as_errors, set_json

import nas_gate
from nas_gate import candidate, cli
from nas_gate.collect import collect
from nas_gate.report import page, report_data


def command(settings: Any) -> str:
    return f"nas-gate search target={settings['target']}"


def record(studies: Path, **more: Any) -> dict[str, Any]:
    return report_data(collect([studies / "alpha", studies / "beta"]), command, **more)


def of(data: dict[str, Any], study: str, trial: int) -> dict[str, Any]:
    return next(each for each in data["candidates"] if (each["study"], each["trial"]) == (study, trial))


# --- the record ---------------------------------------------------------------------------------------------


def test_figures_marks_and_commands(studies: Path):
    data = record(studies)
    assert len(data["candidates"]) == 8
    knee = of(data, "alpha", 1)
    assert (knee["accuracy"], knee["macs"], knee["dense_macs"], knee["param.budget.arguments.weight"]) == (
        *(0.93, 400_000, 1_000_000),
        24.0,
    )
    assert [of(data, "alpha", n)["on_front"] for n in range(4)] == [True, True, False, True]
    assert [of(data, "alpha", n)["knee"] for n in range(4)] == [False, True, False, False]
    assert knee["command"] == "nas-gate search target=0.4"
    assert of(data, "alpha", 0)["test_accuracy"] is None
    assert data["varied"] == ["param.budget.arguments.weight"]
    assert list(data["axes"]) == ["macs", "params"]  # no latency was measured
    assert [(row["study"], row["method"], row["candidates"]) for row in data["summary"]] == [
        ("alpha", "gates", 4),
        ("beta", "gates", 3),
        ("beta", "uniform", 1),
    ]
    assert data["summary"][0]["hypervolume"] == 0.721  # 0.2 x 0.80 + 0.3 x 0.93 + 0.3 x 0.94
    assert data["summary"][2]["best_accuracy"] == 0.85
    assert [each["path"] for each in data["skipped"]] == [str(studies / "alpha" / "5")]
    assert data["unfinished"] == 1
    json.dumps(data, allow_nan=False)


def test_the_record_of_an_error(studies: Path):
    """1 - accuracy of alpha: the same marks, the best is the lowest, and no hypervolume without a reference."""
    data = report_data(collect([as_errors(studies / "alpha", studies / "gamma")]), command)
    assert data["quality"] == {
        "name": "rmse",
        "higher_is_better": False,
        "shown": ".4f",
        "label": "rmse",
        "percent": False,
    }
    assert [of(data, "gamma", n)["on_front"] for n in range(4)] == [True, True, False, True]
    assert [of(data, "gamma", n)["knee"] for n in range(4)] == [False, True, False, False]
    assert (of(data, "gamma", 1)["rmse"], of(data, "gamma", 1)["dense_rmse"]) == (0.07, 0.05)
    assert (data["summary"][0]["best_rmse"], data["summary"][0]["hypervolume"]) == (0.06, None)
    assert all(len(curve["rmse"]) == len(curve["epoch"]) for curve in of(data, "gamma", 1)["curves"].values())
    assert "accuracy" not in json.dumps([data["candidates"], data["summary"]])


def test_widths_are_those_of_the_networks(studies: Path):
    data = record(studies)
    for trial in (1, 3):  # of different searches
        shown = of(data, "alpha", trial)
        network = dict(nas_gate.load(studies / "alpha" / str(trial) / "candidate").named_modules())
        sizes = [
            getattr(network[name], "out_channels", None) or network[name].out_features for name, _, _ in shown["widths"]
        ]
        assert [kept for _, kept, _ in shown["widths"]] == sizes
    first, third = (of(data, "alpha", n)["widths"] for n in (1, 3))
    assert [(name, dense) for name, _, dense in first] == [(name, dense) for name, _, dense in third]
    assert sum(kept for _, kept, _ in third) < sum(kept for _, kept, _ in first) < sum(dense for _, _, dense in first)


def test_costs_in_milliseconds_are_shown_as_shares_of_the_dense_cost(studies: Path):
    trial = studies / "alpha" / "1"
    set_json(trial / "settings.json", metric="latency_ms")
    set_json(trial / "result.json", dense_predicted_latency_ms=4.0)
    history = json.loads((trial / "history.json").read_text())
    shares = of(record(studies), "alpha", 1)["curves"]["gated"]["cost"]
    assert shares == pytest.approx([epoch["figures"]["cost"] / 4.0 for epoch in history["gated"]], rel=1e-5)


def test_curves_are_the_history(studies: Path):
    history = json.loads((studies / "alpha" / "1" / "history.json").read_text())
    curves = of(record(studies), "alpha", 1)["curves"]
    assert list(curves) == ["dense", "gated", "finetuned"]
    assert curves["dense"]["epoch"] == [1, 2]
    assert curves["gated"]["epoch"] == [1, 2]
    assert curves["finetuned"]["epoch"] == [3]  # one cycle: it goes on where the gates ended
    for stage, epochs in history.items():
        assert curves[stage]["accuracy"] == pytest.approx([epoch["accuracy"] for epoch in epochs], rel=1e-5)
    assert curves["dense"]["cost"] == [None, None]
    assert curves["gated"]["cost"] == pytest.approx([e["figures"]["cost"] for e in history["gated"]], rel=1e-5)


def test_what_is_not_there_is_left_open(studies: Path, monkeypatch: pytest.MonkeyPatch):
    (studies / "alpha" / "1" / "history.json").unlink()
    (studies / "alpha" / "2" / "history.json").write_text("{")
    folder = studies / "alpha" / "0" / "candidate"
    own = candidate.read(folder)
    model = {"name": "own_nets_of_report:net", "arguments": own.model["arguments"]}
    candidate.save(folder, nas_gate.load(folder), own.cut, model, own.figures, own.provenance)

    def unknown(settings: Any) -> str:
        raise ValueError("settings of another version")

    data = report_data(collect([studies / "alpha"]), unknown)
    assert of(data, "alpha", 1)["curves"] == {}
    assert of(data, "alpha", 2)["curves"] == {}
    assert of(data, "alpha", 1)["command"] is None
    assert of(data, "alpha", 0)["widths"] is None  # what a candidate names is not imported

    (studies / "own_nets_of_report.py").write_text("from nas_gate.models.digits import digits_cnn as net\n")
    monkeypatch.syspath_prepend(studies)
    data = report_data(collect([studies / "alpha"]), unknown, "own_nets_of_report:net")
    assert of(data, "alpha", 0)["widths"] == of(data, "alpha", 1)["widths"]


def test_a_candidate_that_does_not_fit_its_dense_model_has_no_widths(
    studies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    own = studies / "alpha" / "1" / "candidate"
    record = candidate.read(own)
    model = {**record.model, "arguments": {**record.model["arguments"], "width": 0.125}}  # narrower than what was kept
    candidate.save(own, nas_gate.load(own), record.cut, model, record.figures, record.provenance)
    monkeypatch.chdir(studies)
    assert cli.main(["report", "alpha"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "4 candidates: report.html\n"
    assert "nas-gate: without widths alpha/1/candidate: alpha/1/candidate does not fit its dense model: " in shown.err
    data = report_data(collect([Path("alpha")]), command)
    assert [of(data, "alpha", n)["widths"] is None for n in range(4)] == [False, True, False, False]
    assert "does not fit its dense model" in of(data, "alpha", 1)["misfit"]


def test_the_page_holds_the_record_and_needs_no_network(studies: Path):
    set_json(studies / "alpha" / "1" / "result.json", method="</script><script>alert(1)</script>@@PLOTLY@@")
    data = record(studies)
    text = page(data)
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.DOTALL)  # all but plotly.js
    assert len(own) < len(text) - 1_000_000
    assert "http" not in own
    assert "alert(1)</script>" not in own
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', own, flags=re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == data


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium without a window and without a network."""
    places = shutil.which("chromium"), shutil.which("chromedriver")
    if None in places:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for name in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1440,1400"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(places[1]))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, studies: Path, tmp_path: Path) -> Any:
    """The browser, with the page of alpha and beta open."""
    file = tmp_path / "report.html"
    file.write_text(page(record(studies)), encoding="utf-8")
    browser.get(file.as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def text(browser: Any, css: str) -> str:
    return " ".join(browser.find_element("css selector", css).text.split())


def shape_of(browser: Any, path: str) -> Any:
    """The drawn mark of a candidate in the front's picture."""
    return browser.execute_script(
        """const front = document.getElementById("front");
        const index = front.data.findIndex(t => t.meta === "candidates" && t.customdata.includes(arguments[0]));
        const drawn = [...front.querySelectorAll(".scatterlayer .trace")]
          .find(t => t.__data__[0].trace.index === index);
        return drawn.querySelectorAll(".points path")[front.data[index].customdata.indexOf(arguments[0])];""",
        path,
    )


def strong(browser: Any) -> set[str]:
    """The candidates whose marks have their study's colour, by the drawn elements."""
    return set(
        browser.execute_script(
            """const front = document.getElementById("front"), found = [];
            for (const drawn of front.querySelectorAll(".scatterlayer .trace")) {
              const trace = front.data[drawn.__data__[0].trace.index];
              if (trace.meta === "candidates") drawn.querySelectorAll(".points path").forEach((path, i) => {
                if (getComputedStyle(path).fill !== "rgb(195, 202, 211)") found.push(trace.customdata[i]);
              });
            }
            return found;"""
        )
    )


def bars(browser: Any) -> list[list[Any]]:
    """[layer, kept, dense] as the bars show them."""
    return browser.execute_script(
        """const [dense, kept] = document.getElementById("widths").data;
        return kept.x.map((layer, i) => [layer, kept.y[i], dense.y[i]]);"""
    )


def test_a_click_shows_the_candidate(opened: Any, studies: Path):
    from selenium.webdriver.common.action_chains import ActionChains

    data = record(studies)
    assert text(opened, "#details-title").startswith("alpha, trial 1 (gates, target 0.4, seed 0)")  # the knee
    assert bars(opened) == of(data, "alpha", 1)["widths"]

    path = str(studies / "alpha" / "3" / "candidate")
    ActionChains(opened).move_to_element(shape_of(opened, path)).perform()
    hover = text(opened, "#front .hoverlayer")
    for words in ("alpha, trial 3", "80.00%", "200.0 K (20.0% of dense)", "budget.weight: 8"):
        assert words in hover
    ActionChains(opened).move_to_element(shape_of(opened, path)).click().perform()
    assert text(opened, "#details-title").startswith("alpha, trial 3 (gates, target 0.2, seed 0)")
    assert "validation accuracy 80.00% dense 95.00%, -15.00 points" in text(opened, "#details-figures")
    assert text(opened, "#command") == "nas-gate search target=0.2"
    assert text(opened, "#export") == f"nas-gate export {path}"
    assert bars(opened) == of(data, "alpha", 3)["widths"]
    # a bar of each kind for every layer is really drawn
    assert len(opened.find_elements("css selector", "#widths .bars path")) == 2 * len(bars(opened))
    assert opened.execute_script("return document.getElementById('curves').data.map(t => t.name)") == [
        *("dense", "gated", "cost of the open gates", "finetuned"),
    ]
    chosen = opened.find_elements("css selector", "#candidates tr.chosen")
    assert [row.get_attribute("data-path") for row in chosen] == [path]


def test_bounds_highlight_what_remains(opened: Any, studies: Path, request: pytest.FixtureRequest):
    def paths(*trials: tuple[str, int]) -> set[str]:
        return {str(studies / study / str(number) / "candidate") for study, number in trials}

    def standing() -> set[str]:
        rows = opened.find_elements("css selector", "#candidates tbody tr:not(.out)")
        return {row.get_attribute("data-path") for row in rows}

    everything = paths(*(("alpha", n) for n in range(4)), *(("beta", n) for n in range(4)))
    assert strong(opened) == standing() == everything
    opened.find_element("id", "max-macs").send_keys("0.5M")
    left = everything - paths(("alpha", 0))
    assert strong(opened) == standing() == left
    assert text(opened, "#remaining") == "7 of 8 candidates remain"
    opened.find_element("id", "min-accuracy").send_keys("92%")
    left = paths(("alpha", 1), ("alpha", 2), ("beta", 1), ("beta", 2))
    assert strong(opened) == standing() == left
    assert "beta, trial 2: 94.00%, 500.0 K MACs" in text(opened, "#remaining-best")
    opened.find_element("id", "max-params").send_keys("55K")
    assert strong(opened) == standing() == paths(("alpha", 1), ("alpha", 2))
    shot = os.environ.get("NAS_GATE_SCREENSHOT")
    assert opened.save_screenshot(shot or str(studies.parent / "report.png"))

    opened.find_element("id", "max-params").send_keys("?")  # no number: told, and no bound
    invalid = opened.find_elements("css selector", "input:invalid")
    assert [field.get_attribute("id") for field in invalid] == ["max-params"]
    assert standing() == left
    opened.find_element("id", "clear").click()
    assert strong(opened) == standing() == everything


def test_other_costs_and_orders(opened: Any, studies: Path):
    from selenium.webdriver.support.ui import Select

    Select(opened.find_element("id", "axis")).select_by_value("params")
    costs = opened.execute_script("return document.getElementById('front').data.find(t => t.meta === 'candidates').x")
    assert sorted(costs) == [20_000, 50_000, 55_000, 80_000]

    def accuracies() -> list[str]:
        rows = opened.find_elements("css selector", "#candidates tbody tr")
        column = [head.get_attribute("data-column") for head in opened.find_elements("css selector", "#candidates th")]
        return [row.find_elements("css selector", "td")[column.index("accuracy")].text for row in rows]

    for up in (True, False):
        opened.find_element("css selector", "#candidates th[data-column=accuracy]").click()
        expected = ["80.00%", "85.00%", "90.00%", "92.00%", "92.00%", "93.00%", "94.00%", "94.00%"]
        assert accuracies() == (expected if up else expected[::-1])
    summary = text(opened, "#summary")
    for words in ("alpha, gates 4 3 0.7210 94.00%", "beta, uniform 1 1 0.4250 85.00%"):
        assert words in summary


def test_costs_that_differ_much_stand_on_a_logarithmic_axis(browser: Any, studies: Path, tmp_path: Path):
    """As the ratio of two costs, so the distance of their marks; a bound's shade begins where the bound is."""
    cheapest = studies / "alpha" / "3"  # 200 K of MACs; 20 times less than the dense million makes the axis logarithmic
    set_json(cheapest / "result.json", macs=50_000)
    data = record(studies)
    assert data["pictures"]["macs"]["logarithmic"]
    assert not data["pictures"]["params"]["logarithmic"]
    file = tmp_path / "report.html"
    file.write_text(page(data), encoding="utf-8")
    browser.get(file.as_uri())

    def across(path: Path) -> float:
        box = shape_of(browser, str(path / "candidate")).rect
        return float(box["x"] + box["width"] / 2)

    marks = [across(studies / "alpha" / str(n)) for n in (3, 1, 0)]
    costs = [of(data, "alpha", n)["macs"] for n in (3, 1, 0)]
    assert costs == [50_000, 400_000, 700_000]
    share = math.log(costs[1] / costs[0]) / math.log(costs[2] / costs[0])
    assert (marks[1] - marks[0]) / (marks[2] - marks[0]) == pytest.approx(share, abs=0.01)
    browser.find_element("id", "max-macs").send_keys("400K")
    assert browser.find_element("css selector", "#front .shapelayer path").rect["x"] == pytest.approx(marks[1], abs=2)
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_the_page_of_an_error(browser: Any, studies: Path, tmp_path: Path):
    file = tmp_path / "report.html"
    gamma = as_errors(studies / "alpha", studies / "gamma")
    file.write_text(page(report_data(collect([gamma]), command)), encoding="utf-8")
    browser.get(file.as_uri())
    assert text(browser, "#front-title") == "Validation rmse against cost"
    assert "validation rmse 0.0700 dense 0.0500, +0.0200" in text(browser, "#details-figures")
    assert text(browser, "#front .ytitle") == text(browser, "#curves .ytitle") == "validation rmse"
    assert "gates 4 3 – 0.0600" in text(browser, "#summary")
    assert "volume: none, for rmse has no worst value. best: lowest validation rmse." in text(browser, "#summary-note")
    browser.find_element("id", "max-rmse").send_keys("0.075")
    assert strong(browser) == {str(gamma / str(number) / "candidate") for number in (0, 1)}
    assert text(browser, "#remaining") == "2 of 4 candidates remain"
    assert text(browser, "#remaining-best") == "best of them: gamma, trial 0: 0.0600, 700.0 K MACs"
    for field, written in (("max-rmse", "7 %"), ("max-macs", "-5")):
        browser.find_element("id", "clear").click()
        browser.find_element("id", field).send_keys(written)
        invalid = browser.find_elements("css selector", "input:invalid")
        assert [each.get_attribute("id") for each in invalid] == [field]
    browser.find_element("id", "clear").click()
    shown = browser.find_element("tag name", "body").text.lower()
    assert "accura" not in shown
    shot = os.environ.get("NAS_GATE_SCREENSHOT")
    assert browser.save_screenshot(f"{shot}.errors.png" if shot else str(tmp_path / "report.png"))
    assert [entry["message"] for entry in browser.get_log("browser")] == []
