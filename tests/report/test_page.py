"""The page holds what it should, whatever the columns are called, and asks nobody for anything."""

import html.parser
import json
import re

import jax.random as jr
import numpy as np
import pytest

import laminar
from laminar._errors import InputError
from laminar.report.anomalies import anomalies
from laminar.report.markup import content_hash
from laminar.report.page import write_report
from laminar.report.pictures import KINDS, write_pictures
from laminar.report.strange import find_anomalies
from laminar.report.study import study
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table

KEY = jr.key(0)
VOID = {"meta", "input", "path", "br"}


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside scripts; unbalanced tags fail."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", params=["plain", "mixed"])
def page(request):
    """The text of a page, its elements, and what was said of it."""
    path, numbers = request.getfixturevalue(f"{request.param}_page")
    text = path.read_text(encoding="utf-8")
    assert numbers["bytes"] == len(text.encode()) < 3_000_000
    return text, Reader(text), numbers


def test_sections_have_headings_that_the_navigation_leads_to(page):
    _, parsed, _ = page
    ids = [attributes["id"] for attributes in parsed.named("section")]
    assert ids == ["summary", "flow", "columns", "pairs", "calibration", "anomalies"]
    links = [a["href"] for a in parsed.named("a") if a["href"] != "#content"]
    assert links == [f"#{name}" for name in ids]
    assert len(parsed.named("h1")) == len(parsed.named("main")) == len(parsed.named("nav")) == 1
    everything = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(set(everything)) == len(everything)
    for _, attributes in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name, everything[0]) in everything


def test_pictures_tables_and_controls_can_be_read_aloud(page):
    _, parsed, _ = page
    for svg in parsed.named("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert len(parsed.named("caption")) == len(parsed.named("table")) >= 4
    assert all("scope" in th for th in parsed.named("th"))
    labelled = {label.get("for") for label in parsed.named("label")}
    for control in (*parsed.named("select"), *parsed.named("input")):
        assert control["id"] in labelled or control["type"] == "checkbox"
    assert parsed.named("html")[0]["lang"] == "en"


def test_no_name_breaks_the_page(page, hostile):
    _, parsed, _ = page
    text = "".join(parsed.texts)
    assert hostile in text
    assert not parsed.named("b") or all(not a for a in parsed.named("b"))
    assert {name for name, _ in parsed.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "a", "div", "nav", "ul", "li"),
        *("button", "main", "header", "h1", "h2", "h3", "section", "p", "dl", "dt", "dd", "small"),
        *("figure", "figcaption", "svg", "path", "text", "table", "caption", "thead", "tbody"),
        *("tr", "th", "td", "details", "summary", "canvas", "label", "select", "option", "input"),
        *("span", "i", "b", "noscript", "footer", "script"),
    }


def test_nothing_is_asked_of_anyone(page):
    text, parsed, _ = page
    policy = parsed.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; ")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    assert content_hash(style) in policy
    assert content_hash(script) in policy
    for _, attributes in parsed.elements:
        assert not {"src", "srcset", "style", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(
        r"@import|url\(|https?://|fetch\(|XMLHttpRequest|localStorage", style + script
    )


def test_data_of_the_flow_are_in_the_page(page):
    text, parsed, _ = page
    opened = '<script type="application/json" id="motion-data">'
    motion = json.loads(text.split(opened)[1].split("</script>")[0])
    options = parsed.named("option")
    assert len(options) == 2 * len(motion["columns"])
    assert sum("selected" in a for a in options) == 2
    slider = next(a for a in parsed.named("input") if a["type"] == "range")
    assert int(slider["max"]) == len(motion["names"]) - 1


def test_scores_and_training_are_told(page):
    _, parsed, _ = page
    text = "".join(parsed.texts)
    assert "−3.21\u00a0±\u00a00.11" in text
    assert "0.79 more than a Gaussian" in text
    assert "kept after 30" in str(parsed.elements)
    assert "What the density consists of" in text


def test_strangest_rows_are_those_of_the_lowest_density(plain, plain_table, tmp_path):
    values = plain_table.values.copy()
    values[17] = [300.0, 9.0, 1e9 + 30]
    values[99, 1] = 25.0
    table = Table(plain_table.names, values)
    numbers = write_report(plain, table, tmp_path / "r.html", key=KEY)
    assert numbers["strangest"][:2] == [18, 100]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    row = text[text.index('<th scope="row" class="n">100</th>') :].split("</tr>")[0]
    # The cell that was changed comes first, under its hostile name.
    assert row.index("&lt;/script&gt;") < row.index("<b>25</b>") < row.index("</li>")


def test_held_out_rows_are_found_again():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 2)) @ np.array([[1.0, 0.7], [0, 0.6]])
    table = Table(("a", "b"), x)
    model, report = laminar.fit_table(
        table, flow="realnvp", steps=3, batch_size=64, seed=4, progress=False
    )
    assert model.calibration is not None
    found = study(model, table, KEY, report)
    assert found.unseen
    assert len(found.judged) == report["held_out_rows"]
    assert found.log_p.mean() == pytest.approx(report["held_out"]["log_density"], abs=1e-4)
    other = study(model, Table(("a", "b"), x[::-1].copy()), KEY, report)
    assert other.origin is None
    assert len(other.judged) == 300
    unlike = study(model, table, KEY, {**report, "seed": 5})
    assert unlike.origin is None
    # Fitted with a calibration, the model gives new rows p-values.
    assert find_anomalies(model, table, 4, new=False).p_values is None
    strange = find_anomalies(model, table, 4)
    p = strange.p_values
    assert p.shape == (300,)
    assert ((p > 0) & (p <= 1)).all()
    assert [entry.p_value for entry in strange.rows] == sorted(
        entry.p_value for entry in strange.rows
    )
    words = "".join(Reader(anomalies(found, strange)).texts)
    assert "p-values of all rows" in words


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_files(kind, plain, plain_table, meta, tmp_path):
    out = tmp_path / f"{kind}.svg"
    assert write_pictures(plain, plain_table, out, key=KEY, meta=meta, kind=kind) == [str(out)]
    text = out.read_text(encoding="utf-8")
    parsed = Reader(text.split("?>", 1)[1])
    assert len(parsed.named("path")) > 5
    assert parsed.named("svg")[0]["viewbox"].startswith("0 0 ")


def test_all_pictures_go_into_a_folder(mixed, mixed_table, meta, tmp_path):
    files = write_pictures(mixed, mixed_table, tmp_path / "new", key=KEY, meta=meta)
    assert files == [str(tmp_path / "new" / f"{kind}.png") for kind in KINDS]
    for file in files:
        with open(file, "rb") as picture:
            assert picture.read(8) == b"\x89PNG\r\n\x1a\n"


def test_pictures_that_there_are_not_are_refused(plain, plain_table, tmp_path):
    with pytest.raises(InputError, match="does not say how it was fitted"):
        write_pictures(plain, plain_table, tmp_path / "fit.svg", key=KEY, kind="fit")
    with pytest.raises(InputError, match="one file, and there are several"):
        write_pictures(plain, plain_table, tmp_path / "all.svg", key=KEY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "meta",
    [
        {"table": 3, "rows": "many", "seed": None, "held_out": [], "training": 5, "notes": None},
        {"held_out": {"log_density": None, "error": None, "rows": 3}, "baseline": {}},
        {"training": {"flows": {"x": {}}, "parts": [1]}, "seconds": "long", "notes": [3]},
    ],
)
def test_whatever_a_file_says_of_the_fit_there_is_a_page(meta, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 1))
    table = Table(("a",), x)
    model = TableFlow(laminar.Normal(1), learn_schema(table))
    write_report(model, table, tmp_path / "r.html", key=KEY, meta=meta)
    parsed = Reader((tmp_path / "r.html").read_text())
    assert "pairs" not in [a["id"] for a in parsed.named("section")]
    assert not parsed.named("canvas")


def test_a_table_of_one_row_is_refused(plain, plain_table, tmp_path):
    with pytest.raises(InputError, match="needs two or more"):
        write_report(plain, plain_table.take(np.arange(1)), tmp_path / "r.html", key=KEY)
