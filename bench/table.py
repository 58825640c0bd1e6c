"""Rows of the result table: what was measured, the target, and whether it holds."""

from dataclasses import asdict, dataclass


@dataclass
class Row:
    """One figure beside another system's, measured in the same run."""

    area: str
    what: str
    unit: str
    potluck: float | None
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    target: str = ""
    holds: bool | None = None
    note: str = ""

    def json(self) -> dict:
        """As plain data."""
        return asdict(self)


def faster(area, what, potluck, peer, peer_name, at_least, unit="s", note="") -> Row:
    """A row for times: ratio = the other's time by ours, to be at least `at_least` (None: no target)."""
    ratio = peer / potluck if potluck and peer else None
    target = "" if at_least is None else f">= {at_least:g}x"
    holds = None if at_least is None or ratio is None else ratio >= at_least
    return Row(area, what, unit, potluck, peer, peer_name, ratio, target, holds, note)


def share(area, what, value, at_least=None, at_most=None, unit="", note="") -> Row:
    """A row for a figure that has a bound of its own."""
    target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    holds = None
    if at_least is not None:
        holds = value >= at_least
    elif at_most is not None:
        holds = value <= at_most
    return Row(area, what, unit, value, target=target, holds=holds, note=note)


def _number(value) -> str:
    return "-" if value is None else f"{value:.4g}"


def text(rows: list[Row]) -> str:
    """The table for people."""
    head = ["area", "what", "potluck", "other", "ratio", "target", "holds", "note"]
    body = [
        [
            row.area,
            row.what,
            f"{_number(row.potluck)} {row.unit}".strip(),
            f"{_number(row.peer)} ({row.peer_name})" if row.peer_name else "-",
            _number(row.ratio),
            row.target or "-",
            {True: "yes", False: "NO", None: "-"}[row.holds],
            row.note,
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *body]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
