"""Links that leave docs/, for the site: a hook of mkdocs (`mkdocs.yml`).

Pages link to other files of the repository by relative paths, `../CONTRIBUTING.md`, as a code host
follows them. The site gets each file that some page links to under `repository/`: Markdown as a
page, anything else as plain text. Anchors of headings are made as code hosts make them.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, its text without markup, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def replace_links(text: str, change: Callable[[str], str]) -> str:
    """The Markdown with the target of each link changed; code blocks stay as they are.

    Args:
        text: Markdown.
        change: target -> target.
    """

    def outside_code(part: str) -> str:
        return LINK.sub(lambda m: m[1] + change(m[2]) + m[3], part)

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [outside_code(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, outside_code(text[end:])])


def links_of(text: str) -> list[str]:
    """The targets of all relative links of a page, with their anchors."""
    found: list[str] = []

    def note(target: str) -> str:
        found.append(target)
        return target

    replace_links(text, note)
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def place_in_site(path: str) -> str:
    """Where mkdocs looks for a file, by its path in the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" + ("" if path.endswith(".md") else ".txt")


def path_of_page(place: str) -> str:
    """The path in the repository of a page, by where mkdocs looks for it."""
    inside = place.removeprefix(f"{OUTSIDE}/")
    return f"docs/{place}" if inside == place else inside


def target_of(path: str, link: str) -> tuple[str, str]:
    """Path in the repository and anchor that a page's relative link leads to.

    Args:
        path: of the page.
        link: such as `../CONTRIBUTING.md#tests`, or `#tests` for the page itself.
    """
    name, _, where = link.partition("#")
    return os.path.normpath(os.path.join(os.path.dirname(path), name)) if name else path, where


def files_outside(pages: Iterator[str]) -> list[str]:
    """Files outside of docs/ that pages lead to, directly or by others of them; sorted paths."""
    found: set[str] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for link in links_of((ROOT / page).read_text()):
            path, _ = target_of(page, link)
            if path.startswith("docs/") or path in found or not (ROOT / path).is_file():
                continue
            found.add(path)
            waiting += [path] if path.endswith(".md") else []
    return sorted(found)


def on_config(config: Any) -> None:
    """Anchors as `anchor` makes them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor


def on_files(files: Any, config: Any) -> None:
    """Adds what lies outside of docs/."""
    from mkdocs.structure.files import File

    pages = (path_of_page(file.src_uri) for file in files.documentation_pages())
    for path in files_outside(pages):
        source = str(ROOT / path)
        files.append(File.generated(config, place_in_site(path), abs_src_path=source))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links that leave docs/, or come back to it, to where the site has the files."""
    place = page.file.src_uri
    own = path_of_page(place)

    def change(link: str) -> str:
        path, where = target_of(own, link)
        if "://" in link or not link.partition("#")[0] or not (ROOT / path).is_file():
            return link
        found = os.path.relpath(place_in_site(path), os.path.dirname(place) or ".")
        return found + (f"#{where}" if where else "")

    return replace_links(markdown, change)
