"""docs/monitoring: every series that the dashboard, the alerts and the table of the docs name is
really exported by a running daemon, with the labels and the values that they ask for."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.shell.raw import BLOCK_TOKENS, many_tokens, raw_client, until
from tests.shell.scraping import get, scrape
from tests.support import running_daemon

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ALERTS = DOCS / "monitoring" / "alerts.yml"
DASHBOARD = DOCS / "monitoring" / "dashboard.json"
OF_THE_SCRAPE = {"instance", "job", "le"}
"""Labels that Prometheus adds, and the bucket's."""
SELECTOR = re.compile(r"\b((?:kvd|process)_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)(=~|!=|=)"([^"]*)"')

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="NOT TESTED: the alerts as Prometheus reads them: no promtool (apt install prometheus)",
)

Exported = dict[str, dict[str, set[str]]]
"""By series: each label, and its values."""


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions_of_dashboard() -> list[str]:
    found = dashboard()
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [each["expr"] for each in found["annotations"]["list"]]
    return expressions + [each["definition"] for each in found["templating"]["list"][1:]]


EXPRESSIONS = [rule["expr"] for rule in alerts()] + expressions_of_dashboard()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What a daemon exports that has seen a client with a model, and nothing else."""
    flags = ("--max-memory", "4MiB", "--metrics", "unix")
    runtime_dir = tmp_path_factory.mktemp("monitoring") / "rt"
    with running_daemon(*flags, runtime_dir=runtime_dir) as daemon, raw_client(daemon) as client:
        context = client.open()
        client.release(context, client.store(context, many_tokens(0, 4 * BLOCK_TOKENS)))
        stored = ("kvd_stored_blocks_total", frozenset())
        until(lambda: scrape(daemon)[stored] == 4)  # an answer may be a moment old
        yield get(daemon, "/metrics").body


@pytest.fixture(scope="module")
def exported(text: str) -> Exported:
    found: Exported = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()
            of_series = found.setdefault(name, defaultdict(set))
            for label, value in re.findall(r'(\w+)="([^"]*)"', labels or ""):
                of_series[label].add(value)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_exported(expression: str, exported: Exported) -> None:
    selectors = SELECTOR.findall(expression)
    assert selectors or re.match(r'up\{job="kvd"\}', expression), expression
    known = set(OF_THE_SCRAPE)
    for name, matchers in selectors:
        assert name in exported, name
        known |= set(exported[name])
        for label, how, value in MATCHER.findall(matchers):
            if label in OF_THE_SCRAPE:
                continue
            for each in value.split("|") if how == "=~" else [value]:
                assert each in exported[name][label], f"{name}{{{label}={each}}}"
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= known, expression


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_rates_are_of_what_only_grows_and_the_rest_is_not(
    expression: str, exported: Exported, text: str
) -> None:
    counters = r"_total|_bucket|_count|_sum"
    for function, name in re.findall(r"(\w+)\(((?:kvd|process)_\w+)", expression):
        if function in ("rate", "increase"):
            assert re.search(rf"({counters})$", name), expression
    for name in re.findall(r"(?<![a-z]\()\b(kvd_\w+(?:_total|_bucket))\b", expression):
        assert re.search(rf"(rate|increase)\({name}", expression), expression
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing), expression


def test_the_rules_are_whole() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) > 10
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule
        assert re.fullmatch(r"Kvd[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert all(rule["annotations"].values())


def test_the_dashboard_is_whole() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_the_table_in_the_docs_has_every_series_and_no_other(text: str) -> None:
    table = (DOCS / "monitoring.md").read_text().split("## Series")[1]
    rows = re.findall(r"^\| `(\w+)`( \(histogram\))? \| ([^|]*)\|", table, re.MULTILINE)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name: bool(histogram) for name, histogram, _ in rows} == {
        name: kind == "histogram" for name, kind in kinds.items()
    }


def test_the_labels_in_the_docs_are_those_exported(exported: Exported) -> None:
    table = (DOCS / "monitoring.md").read_text().split("## Series")[1]
    rows = re.findall(r"^\| `(\w+)`( \(histogram\))? \| ([^|]*)\|", table, re.MULTILINE)
    for name, histogram, labels in rows:
        if name != "kvd_config_info":
            found = set(exported[f"{name}_count" if histogram else name])
            assert set(re.findall(r"`(\w+)`", labels)) == found, name


@needs_promtool
def test_prometheus_takes_the_rules_the_expressions_and_the_text(text: str, tmp_path: Path) -> None:
    def run(*command: str, said: str = "") -> None:
        done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    run("promtool", "check", "rules", str(ALERTS))
    run("promtool", "check", "metrics", said=text)
    rules = [
        {"record": f"expression:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(EXPRESSIONS)
        if not expression.startswith("label_values")
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run("promtool", "check", "rules", str(file))
