"""Write the table of values into each chart's README.md, from its values.schema.json: `python helm/readme.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- values: written by helm/readme.py -->", "<!-- end of the values -->"


def rows(properties: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted name, default and meaning of every value."""
    for name, node in properties.items():
        if node.get("type") == "object" and "default" not in node:
            yield f"{prefix}{name}", None, node["description"]
            yield from rows(node["properties"], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node["default"], node["description"]


def table(schema: dict[str, Any]) -> str:
    """The values as a table."""
    lines = ["| Value | Default | |", "|---|---|---|"]
    for name, default, meaning in rows(schema["properties"]):
        shown = "" if default is None else f"`{json.dumps(default)}`"
        lines.append(f"| `{name}` | {shown} | {meaning} |".replace("\n", " "))
    return "\n".join(lines)


def written(chart: Path) -> str:
    """A chart's README with its table as the schema has it."""
    text = (chart / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    schema = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    return f"{before}{BEGIN}\n\n{table(schema)}\n\n{END}{after}"


def main() -> int:
    """Write them all."""
    for schema in sorted(Path(__file__).parent.glob("*/values.schema.json")):
        (schema.parent / "README.md").write_text(written(schema.parent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
