"""The dashboard's static files: complete, self-contained, and with what a browser should be told about them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gpuckpt.service import dashboard
from gpuckpt.service.dashboard import files

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return files()[name].body.decode()


def test_what_the_page_loads_is_there() -> None:
    loaded = re.findall(r'(?:href|src)="/dashboard/([^"]+)"', text("index.html"))
    assert {"app.js", "style.css", "icon.svg"} == set(loaded)
    for name in files():
        if name.endswith(".js"):
            imported = re.findall(r'^import .* from "\./([^"]+)";$', text(name), re.MULTILINE)
            assert set(imported) <= set(files()), name
            assert len(imported) == len(re.findall(r"^import\b", text(name), re.MULTILINE)), name


def test_every_file_is_served() -> None:
    folder = Path(dashboard.__file__).parent
    assert set(files()) == {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {one.kind.partition(";")[0] for one in files().values()} == {
        "image/svg+xml",
        "text/css",
        "text/html",
        "text/javascript",
    }


@pytest.mark.parametrize("name", sorted(files()))
def test_nothing_comes_from_elsewhere_or_is_parsed(name: str) -> None:
    addresses = set(re.findall(r"\bhttps?:[^\s\"')]+|url\(", text(name)))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text(name))
    # The policy refuses them.
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=\"|<script(?![^>]* src=)", text(name))


def test_the_headers() -> None:
    page = files()["index.html"]
    headers = page.headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Length"] == str(len(page.body))
    assert headers["Cache-Control"] == "no-cache" and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert files()["app.js"].headers["ETag"] != headers["ETag"] == page.etag


def test_what_a_client_has_is_not_sent_again() -> None:
    page = files()["index.html"]
    assert page.known(page.etag) and page.known(f'"other", W/{page.etag}') and page.known("*")
    assert not page.known(None) and not page.known("") and not page.known('"other"')


def test_the_wheel_carries_the_files() -> None:
    """All of the package's folder goes in, but for what .gitignore names."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["gpuckpt"] and not {"exclude", "only-include", "include"} & set(wheel)
