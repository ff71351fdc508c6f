from pathlib import Path

from tools.scaling.__main__ import scaling_table

DOCS = Path(__file__).parents[3] / "docs" / "scaling.md"


def test_the_table_of_the_docs_is_what_the_tool_prints() -> None:
    assert scaling_table() in DOCS.read_text()
