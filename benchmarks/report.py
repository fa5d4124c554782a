"""Tables of the results, as text and as the page of the documentation."""


def cell(value, form: str) -> str:
    return "-" if value is None else form.format(value)


def cells(rows: list[dict], columns: dict[str, str]) -> list[list[str]]:
    lines = [
        [cell(row.get(key), form) for key, form in columns.items()] for row in rows
    ]
    return [list(columns), *lines]


def text_table(rows: list[dict], columns: dict[str, str]) -> str:
    """Columns of equal width: words to the left, numbers to the right."""
    lines = cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines)]
    words = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    align = lambda text, width, word: text.ljust(width) if word else text.rjust(width)
    return "\n".join(
        "  ".join(map(align, line, widths, words)).rstrip() for line in lines
    )


def machine_lines(machine: dict) -> list[str]:
    facts = {key: value for key, value in machine.items() if key != "versions"}
    lines = [f"{key}: {value}" for key, value in facts.items()]
    versions = (f"{name} {number}" for name, number in machine["versions"].items())
    return [*lines, ", ".join(versions)]
