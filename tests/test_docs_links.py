"""What the pages say can be followed: links, anchors, the site's contents, code and commands.

Needs neither the network nor mkdocs: links to other sites are not followed, and `make docs` builds.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml

from fastgoal_models.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^ *(```+|~~~+)[ ]*(\w*)[^\n]*\n(.*?)^ *\1[ ]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(
    r"\]\(\s*<?([^\s)>]+)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE
)
_HTML = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"")
_ID = re.compile(r"<[a-z]+\b[^>]*?\bid=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)
_OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def links(text: str) -> list[str]:
    """Where a page's links and pictures point, without those in its code."""
    prose = _CODE.sub("", _FENCE.sub("", text))
    found = [first or second for first, second in _LINK.findall(prose)]
    return [link for link in found + _HTML.findall(prose) if not _OUTSIDE.match(link)]


def anchors(text: str, in_site: bool) -> set[str]:
    """The names that `#…` can follow on GitHub and, for a page of the site, on it as well."""
    without_code = _FENCE.sub("", text)
    headings = [_plain(heading) for heading in _HEADING.findall(without_code)]
    found = _numbered([_github(heading) for heading in headings], "-")
    if in_site:
        found &= _numbered([_mkdocs(heading) for heading in headings], "_")
    return found | set(_ID.findall(without_code))


def _plain(heading: str) -> str:
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return heading.replace("`", "").replace("*", "")


def _github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _mkdocs(heading: str) -> str:
    letters = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", letters).strip().lower())


def _numbered(slugs: list[str], mark: str) -> set[str]:
    return {
        slug if (before := slugs[:place].count(slug)) == 0 else f"{slug}{mark}{before}"
        for place, slug in enumerate(slugs)
    }


def broken(page: Path, root: Path = ROOT, docs: Path = DOCS) -> list[str]:
    """What is wrong with a page's relative links, one line each."""
    wrong = []
    for link in links(page.read_text("utf-8")):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith("/") or not target.is_relative_to(root):
            wrong.append(f"{link}: leaves the repository")
        elif not target.exists():
            wrong.append(f"{link}: there is no such file")
        elif page.is_relative_to(docs) and not target.is_relative_to(docs):
            wrong.append(f"{link}: leaves docs/, and so the site")
        elif anchor and target.suffix == ".md":
            known = anchors(target.read_text("utf-8"), target.is_relative_to(docs))
            if anchor not in known:
                wrong.append(f"{link}: no such heading; there are {', '.join(sorted(known))}")
    return wrong


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The page's code in one of these languages, and the line that each block begins on."""
    text = page.read_text("utf-8")
    for fence in _FENCE.finditer(text):
        if fence[2] in languages:
            yield text.count("\n", 0, fence.start(3)) + 1, fence[3]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_and_anchors_lead_somewhere(page):
    assert broken(page) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_of_the_pages_compiles(page):
    for line, code in blocks(page, "python", "py"):
        compile("\n" * (line - 1) + code, named(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_the_pages_exist_with_their_options(page):
    for line, code in blocks(page, "bash", "sh"):
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["fastgoal"]:
                try:
                    _parse(words[1:])
                except Exception as error:
                    pytest.fail(f"{named(page)}, line {line}: {command.strip()}\n{error!r}")


def _parse(words: list[str]) -> None:
    """Read a command line as `fastgoal` would, without running it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, words)


def test_every_page_is_in_the_sites_contents_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert site["strict"] is True

    def pages(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for item in part for page in pages(_inner(item))]

    there = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(pages(site["nav"])) == there


def _inner(item: Any) -> Any:
    return next(iter(item.values())) if isinstance(item, dict) else item


def test_broken_links_are_found(tmp_path):
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Top\n[good](docs/a.md#two-words) ![no](docs/no.png)\n")
    (docs / "a.md").write_text(
        "# A\n\n## Two words\n\n## Twice\n\n## Twice\n\n## 1 × 2\n\n"
        "[good](sub/b.md) [good](#two-words) [good](https://example.org/#x) `[code](no.md)`\n"
        "[out](../README.md) [no](b.md) [no](#three) [no](sub/b.md#a 'x')\n[up](../../x.md)\n"
        "[differs](#twice-1) [differs](#1--2)\n\n"
        "```python\n# Heading of code\nx = a[0](no.md)\n```\n\n"
        "[no](#heading-of-code)\n[no]: gone.md\n"
    )
    (docs / "sub" / "b.md").write_text("# B\n\n[good](../a.md#a)\n")
    found = {p.name: broken(p, tmp_path, docs) for p in tmp_path.rglob("*.md")}
    assert [line.partition(":")[0] for line in found["a.md"]] == [
        "../README.md", "b.md", "#three", "sub/b.md#a", "../../x.md", "#twice-1", "#1--2",
        "#heading-of-code", "gone.md",
    ]  # fmt: skip
    assert [line.partition(":")[0] for line in found["README.md"]] == ["docs/no.png"]
    assert found["b.md"] == []


def test_unknown_commands_and_options_are_found():
    _parse(["prepare", "--data", "a.jsonl", "--out", "b.jsonl"])
    for words in (["fly"], ["doctor", "--fly"], ["prepare", "--out", "b.jsonl"]):
        with pytest.raises(Exception, match=r"fly|data"):
            _parse(words)
