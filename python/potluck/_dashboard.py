"""The page that shows a run, served by the peer itself."""

from __future__ import annotations

from typing import Any

from potluck.utils.logging import get_logger

logger = get_logger("potluck")


def serve(session: Any, run_id: str, dashboard: bool | str) -> str | None:
    """Where the page is, if it was asked for. A busy port is no reason not to train."""
    if not dashboard:
        return None
    try:
        url: str = session.serve_dashboard("127.0.0.1:0" if dashboard is True else dashboard)
    except ValueError as error:
        logger.warning("%s: no dashboard: %s", run_id, error)
        return None
    logger.warning("%s: dashboard at %s", run_id, url)
    return url
