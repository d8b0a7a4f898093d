"""Tables in Markdown, padded so that they can be read in a terminal, too."""

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown. Columns of numbers are aligned to the right.

    Example:
        >>> print(format_table(["run", "units"], [["moco", "400,000"], ["dino", "1,000"]]))
        | run  |   units |
        |:-----|--------:|
        | moco | 400,000 |
        | dino |   1,000 |
    """
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    is_number = [all(_starts_as_number(cell) for cell in column[1:]) for column in columns]
    rule = [f"{'-' * (w + 1)}:" if number else f":{'-' * (w + 1)}" for w, number in zip(widths, is_number, strict=True)]
    padded = [
        [cell.rjust(w) if number else cell.ljust(w) for cell, w, number in zip(line, widths, is_number, strict=True)]
        for line in lines
    ]
    texts = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([texts[0], f"|{'|'.join(rule)}|", *texts[1:]])


def _starts_as_number(cell: str) -> bool:
    text = cell.strip("*")
    return not text or text.lstrip("-≤")[:1].isdigit() or text == "-"
