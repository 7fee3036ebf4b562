"""Fields of dataclasses in the API reference: an extension of griffe (`mkdocs.yml`).

Docstrings of this project may tell fields without a heading, `rows: C, of a bucket.`, a line each
and what follows indented. The reference shows them like those under `Attributes:`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the tests run without the extra `docs`
    Extension = object

__all__ = ["FieldLists", "with_heading"]

FIELD = re.compile(r"(\w+): ")


def with_heading(docstring: str, fields: Collection[str]) -> str:
    """The docstring with griffe's headings: `Attributes:` over what tells fields, `Examples:`.

    Args:
        docstring: of a class, without indentation.
        fields: of the class.
    """

    def tells_fields(paragraph: str) -> bool:
        lines = paragraph.split("\n")
        starts = [FIELD.match(line) for line in lines if not line.startswith(" ")]
        names = [start[1] for start in starts if start]
        return len(names) == len(starts) and bool(names) and set(names) <= set(fields)

    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    # Several fields of one line stand apart.
    lines = re.sub(
        r"(?<=\S) {2,}(?=(\w+): )", lambda m: "\n" if m[1] in fields else m[0], docstring
    )
    paragraphs = lines.split("\n\n")
    if not any(part.startswith("Attributes:") for part in paragraphs):
        for at, part in enumerate(paragraphs[1:], 1):
            if tells_fields(part):
                indented = "\n".join(f"    {line}" for line in part.split("\n"))
                paragraphs[at] = f"Attributes:\n{indented}"
    return "\n\n".join(paragraphs)


class FieldLists(Extension):
    """Puts the heading into docstrings before they are read."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Called by griffe for each class."""
        if cls.docstring is not None:
            cls.docstring.value = with_heading(cls.docstring.value, cls.members)
