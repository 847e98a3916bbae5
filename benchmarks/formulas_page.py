"""Write the index of formulas, docs/formulas.md and docs/formulas.zh.md: python -m benchmarks.formulas_page."""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from tether.store.publish import publish_file

__all__ = ["DATA", "anchor", "main", "pages", "read"]

DATA = Path("docs/formulas.toml")
"""Documents, rows and the words of both pages; its head says what the fields mean."""
Row = dict[str, Any]


def read(path: Path = DATA) -> dict[str, Any]:
    """Read the data.

    Args:
        path: of the data.

    Returns:
        `page`, the words by language, and `document`, the documents with their rows.
    """
    return tomllib.loads(path.read_text(encoding="utf-8"))


def pages(data: dict[str, Any]) -> dict[str, str]:
    """Write the pages.

    Args:
        data: from `read`.

    Returns:
        Markdown by the name of the file.
    """
    return {words["file"]: _page(data["document"], words, code) for code, words in data["page"].items()}


def anchor(heading: str) -> str:
    """Name the anchor that GitHub gives to a heading.

    Args:
        heading: without its signs of level.

    Returns:
        Letters and digits of any script in lower case, spaces as hyphens.
    """
    return "".join(sign for sign in heading.lower() if sign.isalnum() or sign in " -_").replace(" ", "-")


def main() -> None:
    """Write both pages."""
    for name, text in pages(read()).items():
        with publish_file(DATA.parent / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def _page(documents: list[Row], words: Row, code: str) -> str:
    parts = [words["head"], _totals(documents, words)]
    for one in documents:
        kinds = words["comma"].join(
            words["kind"].format(count=count, name=words["kinds"][kind])
            for kind, count in one["counted"].items()
        )
        said = [words["original"].format(**one), words["counted"].format(all=len(one["row"]), kinds=kinds)]
        note = words["space"].join([*filter(None, said), one[f"note_{code}"]])
        rows = [_row(f"{one['number']}.{at}", row, words, code) for at, row in enumerate(one["row"], 1)]
        parts.append(
            f"## {words['document'].format(**one)}\n{note}\n\n{_table(words['columns'], rows)}\n",
        )
    return "\n".join(parts)


def _totals(documents: list[Row], words: Row) -> str:
    heads = [words["document"].format(**one) for one in documents]
    counts = [Counter(row["verdict"] for row in one["row"]) for one in documents]
    lines = [
        [f"[{head}](#{anchor(head)})", str(count.total()), *(str(count[name]) for name in words["verdicts"])]
        for head, count in zip(heads, counts, strict=True)
    ]
    total = sum(counts, Counter[str]())
    lines.append(["", str(total.total()), *(str(total[name]) for name in words["verdicts"])])
    return _table([*words["totals"], *words["verdicts"].values()], lines) + "\n"


def _row(number: str, row: Row, words: Row, code: str) -> list[str]:
    why = row.get(f"why_{code}", "")
    listed = (
        [f"`{formula}`" if row["kind"] == "code" else _tex(formula) for formula in row["formulas"]],
        [_link(name.removeprefix("tether."), _source(name)) for name in row.get("functions", [])],
        [f"`{command}`" for command in row.get("commands", [])],
        [_link(name, f"../{name.split('::')[0]}") for name in row.get("tests", [])],
    )
    # A formula inside a section's name is set as one; all else of the name is as printed.
    section = "".join(_tex(part) if at % 2 else part for at, part in enumerate(row["section"].split("$")))
    verdict = f"**{words['verdicts'][row['verdict']]}**" + (words["because"] + why if why else "")
    return [number, section, row[code], *("<br>".join(items) for items in listed), verdict]


# The bars of a table and of a formula are the same sign, so those of a formula are written as commands.
def _tex(formula: str) -> str:
    text = " ".join(formula.split())
    for bar, command in ((r"\|", r"\Vert "), ("|", r"\vert ")):
        text = text.replace(f"{bar} ", bar).replace(bar, command)
    return f"$`{text}`$"


def _link(label: str, target: str) -> str:
    return f"[`{label}`]({target})"


def _source(function: str) -> str:
    return f"../src/{function.split(':')[0].replace('.', '/')}.py"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
