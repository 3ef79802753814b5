"""Every text is escaped on its way into a page, and data come out as they went in."""

import base64
import hashlib
import html.parser
import json

import numpy as np
import pytest

from laminar.report.markup import content_hash, data_element, escape, join, packed, raw_element, tag

HOSTILE = ["</script>", "<b>", "a & b", "\"'", "🌊", "]]>", "<!--", "&lt;", "\u2028"]


class Text(html.parser.HTMLParser):
    """The text of a page, its elements and their attributes, as a browser reads them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.texts, self.elements = [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def read(text):
    parser = Text()
    parser.feed(text)
    parser.close()
    return parser


@pytest.mark.parametrize("text", HOSTILE)
def test_text_and_attributes_survive_whatever_they_hold(text):
    parsed = read(tag("p", text, title=text, id="x"))
    assert "".join(parsed.texts) == text
    assert parsed.elements == [("p", {"title": text, "id": "x"})]


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_page_cannot_end_its_element(text):
    element = data_element("data", {"name": text, "n": [1, 2.5, None]})
    parsed = read(element + "<p>after</p>")
    assert [name for name, _ in parsed.elements] == ["script", "p"]
    assert json.loads(parsed.texts[0]) == {"name": text, "n": [1, 2.5, None]}


def test_a_number_that_json_lacks_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        data_element("data", [float("nan")])


def test_markup_is_not_escaped_twice():
    assert escape(escape("<")) == "&lt;"
    assert join(tag("b", "<"), None, "&") == "<b>&lt;</b>&amp;"


def test_attributes_are_written_as_html_wants_them():
    assert tag("path", class_="a b", stroke_width=2, d="M0 0") == (
        '<path class="a b" stroke-width="2" d="M0 0"/>'
    )
    assert tag("input", type="range", hidden=True, checked=False, max=None) == (
        '<input type="range" hidden/>'
    )
    assert tag("meta", name="viewport") == '<meta name="viewport"/>'
    assert tag("canvas") == "<canvas></canvas>"


def test_hash_is_that_of_the_text():
    digest = base64.b64encode(hashlib.sha256(b"a < b").digest()).decode()
    assert content_hash("a < b") == f"'sha256-{digest}'"
    assert raw_element("style", "a < b") == "<style>a < b</style>"


@pytest.mark.parametrize("order", ["<i2", ">i2"])
def test_arrays_are_little_endian(order):
    text = packed(np.array([[1, -2], [300, 4]], order).T)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<i2"), [1, 300, -2, 4])
