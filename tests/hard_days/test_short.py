"""The short hard days as tests: `make test` plays them, `make hard-days` plays all."""

import pytest
import run
from crew import open_lab

import netlab

SHORT = ("spot_notice", "odd_couple")


def why_not():
    """Why networks cannot be made here, or None."""
    if reason := netlab.missing():
        return reason
    try:
        open_lab().close()
    except netlab.LabError as error:
        return f"no network namespaces here: {error}"
    return None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORT)
def test_short(name: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    lines = run.play(name, run.binary(), minutes=1.0)
    run.show(lines)
    failed = [f"{rule}: {measured}" for _, rule, measured, ok in lines if not ok]
    assert lines and not failed, failed
