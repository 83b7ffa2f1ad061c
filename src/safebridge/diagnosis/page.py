"""Puts a page together: one HTML file with its style, its script and its data, nothing else."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from safebridge.data.sample import open_image

__all__ = ["build_page", "embed_picture", "write_keys", "write_list", "write_table"]

_PICTURE_PIXELS = 160


def build_page(*, title: str, lead: str, body: str, data: Any) -> str:
    """Return a whole page; it fetches nothing, and only its own script may run.

    Args:
        title: Plain text.
        lead: Plain text.
        body: HTML; texts from outside are escaped already.
        data: What the script reads, as JSON values.
    """
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" could end the element that the JSON stands in.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return Template(_read("report_template.html")).substitute(
        title=escape(title),
        lead=escape(lead),
        body=body,
        style=_read("report.css"),
        script=script,
        script_hash=digest,
        data=text,
    )


def embed_picture(path: Path) -> str:
    """Return a picture in small as a data URI.

    Args:
        path: The picture file.

    Raises:
        DataError: If it cannot be read.
    """
    picture = open_image(path)
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_keys(names: Sequence[str]) -> str:
    """Return the legend of bars or curves, in the order of their colours.

    Args:
        names: Plain texts.
    """
    keys = "".join(
        f'<span class="key"><i class="c{number % 6}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="keys">{keys}</div>'


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls where it is too wide.

    Args:
        head: Plain texts.
        rows: HTML of the cells.
    """
    titles = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def write_list(texts: Sequence[str]) -> str:
    """Return a list.

    Args:
        texts: Plain texts.
    """
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


@cache
def _read(name: str) -> str:
    return files("safebridge.diagnosis").joinpath(name).read_text(encoding="utf-8")
