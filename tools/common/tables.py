"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as the pages of the project hold it; numbers stand as they were written."""
    return tabulate(list(rows), headers, tablefmt="github", disable_numparse=True)
