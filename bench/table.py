"""Rows of the result table: what was measured, the target, and whether it holds."""

from dataclasses import asdict, dataclass, field


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
    # More figures of the same measurement, for results.json.
    details: dict = field(default_factory=dict)

    def because(self, reason: str) -> "Row":
        """Why the target is missed, if it is: the note says so."""
        if self.holds is False and self.potluck is not None:
            self.note = f"missed: {reason}" + (f"; {self.note}" if self.note else "")
        return self

    def json(self) -> dict:
        """As plain data."""
        return asdict(self)


def faster(
    area, what, potluck, peer, peer_name, at_least=None, unit="s", note="", ratio=None, details=None
) -> Row:
    """A row for what is better when smaller: ratio = the other's figure by ours (or the median of pairs, if given).

    A target without a figure of ours is missed; without one of the other's there is no verdict.
    """
    if ratio is None and potluck and peer:
        ratio = peer / potluck
    target = "" if at_least is None else f">= {at_least:g}x"
    holds = None
    if at_least is not None:
        holds = False if potluck is None else None if ratio is None else ratio >= at_least
    return Row(area, what, unit, potluck, peer, peer_name, ratio, target, holds, note, details or {})


def share(
    area, what, value, at_least=None, at_most=None, unit="", note="", peer=None, peer_name="", details=None
) -> Row:
    """A row for a figure that has a bound of its own."""
    target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    holds = None
    if at_least is not None or at_most is not None:
        holds = value is not None and (value >= at_least if at_least is not None else value <= at_most)
    row = Row(area, what, unit, value, peer, peer_name, None, target, holds, note, details or {})
    return row


def failed(area, what, target, why) -> Row:
    """A figure that could not be taken: it counts as missed."""
    return Row(area, what, "", None, target=target, holds=False, note=" ".join(str(why).split())[:300])


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
