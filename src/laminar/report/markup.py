"""HTML and SVG from Python calls, with every text escaped on its way in.

A `Markup` is text that is known to be markup; only `tag`, `join` and `raw_element` make one. All
else that reaches a page is escaped, so that a column named ``</script>`` is a column with that name
and nothing more.
"""

import base64
import hashlib
import html
import json
from typing import Any

import numpy as np

_VOID = frozenset({"meta", "input", "br", "link", "path", "rect", "line", "circle"})


class Markup(str):
    """Text in which markup has its meaning."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any value as text, escaped for the inside of an element or of a quoted attribute."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def join(*parts: object) -> Markup:
    """Parts one after the other; None is left out."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Its name.
        *children: What it holds: markup, or text to be escaped.
        **attributes: Its attributes. Underscores become hyphens and one at the end is dropped
            (``class_``); True stands for an attribute without a value, None and False leave it out.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    opened = f"<{name}{''.join(written)}"
    if name in _VOID and not children:
        return Markup(f"{opened}/>")
    return Markup(f"{opened}>{join(*children)}</{name}>")


def raw_element(name: str, text: str, /, **attributes: object) -> Markup:
    """A script or style of our own, whose text the parser takes as it stands."""
    opened = tag(name, **attributes).removesuffix(f"</{name}>")
    return Markup(f"{opened}{text}</{name}>")


def data_element(identity: str, value: Any) -> Markup:
    """A block of JSON that a script finds by its id; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside strings, where alone these can stand, JSON reads the escapes as the characters.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return raw_element("script", text, type="application/json", id=identity)


def content_hash(text: str) -> str:
    """The source expression of a content security policy that admits one inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def packed(array: np.ndarray) -> str:
    """The bytes of an array, little-endian and in C order, in base64."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(little.tobytes()).decode("ascii")
