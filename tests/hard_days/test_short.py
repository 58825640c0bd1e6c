"""The short hard days as tests: `make test` plays them, `make hard-days` plays all."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import rules
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


def test_warnings_are_errors_and_everything_has_a_time_limit(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings") == ["error"]
    assert float(pytestconfig.getini("timeout")) > 0


def test_what_the_killed_may_leave_is_one_notice(tmp_path: Path) -> None:
    notices = tmp_path / "potluck-user"
    notices.mkdir()
    (notices / "1-0.json").write_text("{}")
    killed = SimpleNamespace(private=tmp_path, killed=True)
    assert rules.litter(killed) == set()
    assert rules.litter(SimpleNamespace(private=tmp_path, killed=False)) == {notices, notices / "1-0.json"}
    for more in (notices / "1-1.json", tmp_path / "other"):
        more.write_text("")
        assert len(rules.litter(killed)) == 1, more
        more.unlink()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORT)
def test_short(name: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    lines = run.play(name, run.binary(), minutes=1.0)
    run.show(lines)
    failed = [f"{rule}: {measured}" for _, rule, measured, ok in lines if not ok]
    assert lines and not failed, failed
