from __future__ import annotations

from pathlib import Path

import pytest

from midge.runtime.page import render_page, write_page

HOSTILE = '</title><script>alert("1")</script>'


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "small.html.jinja"
    path.write_text(
        '{% extends "page.html.jinja" %}{% block content %}<p>{{ what }} {{ 1234 | count }}</p>{% endblock %}'
    )
    return path


def test_a_template_fills_the_shell_and_its_values_are_text(template: Path, tmp_path: Path) -> None:
    page = render_page(template, HOSTILE, HOSTILE, what=HOSTILE)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page and page.count("&lt;script&gt;") == 4
    assert "1,234" in page
    write_page(tmp_path / "new" / "page.html", page)
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page


def test_images_are_forbidden_unless_the_page_inlines_them(template: Path) -> None:
    policies = [render_page(template, "a", "b", inline_images=inline, what="") for inline in (False, True)]
    assert "img-src" not in policies[0] and 'img-src data:"' in policies[1]
    assert all("default-src 'none'" in policy for policy in policies)


def test_a_value_that_is_missing_is_an_error(template: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(jinja2.UndefinedError):
        render_page(template, "a", "b")
