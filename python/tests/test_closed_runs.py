"""Runs that only the invited can join."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_optimizer import SGD, batches, distance, equal, make_model, plain, train_together

import potluck
from potluck import _core
from potluck.dht import DHT

COMMON: dict[str, Any] = {"run_id": "r", "target_batch_size": 16, "batch_size_per_step": 8}


def optimizer(dht: DHT, **kwargs: Any) -> potluck.Optimizer:
    return potluck.Optimizer(dht=dht, optimizer=SGD(make_model().parameters()), **COMMON, **kwargs)


def test_the_invited_train_together(loopback_dht: Callable[..., DHT], tmp_path: Path) -> None:
    first = loopback_dht(identity_path=tmp_path / "owner.key")
    owner = first.peer_id
    assert _core.Node.read_token(first.token("r"))[2] is None, "an open run needs no invite"
    token = first.token("r", invite=True)
    handed = iter([first])
    reference = make_model()
    plain(SGD, batches(3, 16), reference)
    models = train_together(
        lambda: next(handed, None) or loopback_dht(token), [8, 8], 3, delay_state_averaging=False, owner=owner
    )
    assert equal(*models) and distance(reference, models[0]) < 1e-6


def test_the_token_of_another_run_is_noticed(
    loopback_dht: Callable[..., DHT], caplog: pytest.LogCaptureFixture
) -> None:
    first = loopback_dht()
    for run_id, joined, warnings in (("mine", "mine", 0), ("potluck", "mine", 0), ("theirs", "mine", 1)):
        second = loopback_dht(first.token(run_id))
        with caplog.at_level("WARNING", logger="potluck"):
            caplog.clear()
            for _ in range(2):
                assert second.admission(joined, None) == (None, None)
        assert [record.message for record in caplog.records] == warnings * [
            "the token is for the run 'theirs', this program joins the run 'mine': it will not meet those who train "
            "the other"
        ]


def test_a_member_can_hand_its_token_on(loopback_dht: Callable[..., DHT], tmp_path: Path) -> None:
    first = loopback_dht(identity_path=tmp_path / "owner.key")
    owner = str(first.peer_id)
    with optimizer(first, owner=owner):
        second = loopback_dht(first.token("r"))
        with optimizer(second, owner=owner):
            run, addresses, invite = _core.Node.read_token(second.token("r"))
            assert (run, invite) == ("r", _core.Node.read_token(first.token("r"))[2])
            assert all(str(second.peer_id) in address for address in addresses)


def test_the_uninvited_stay_outside(loopback_dht: Callable[..., DHT], tmp_path: Path) -> None:
    first = loopback_dht(identity_path=tmp_path / "owner.key")
    owner = first.peer_id
    with optimizer(first, owner=owner) as member:
        stranger = loopback_dht()
        with pytest.raises(ValueError, match="closed and this peer has no invite"):
            optimizer(stranger, owner=owner)
        with pytest.raises(ValueError, match="give owner="):
            optimizer(loopback_dht(first.token("r")))
        with pytest.raises(ValueError, match="owner='me': expected a peer id"):
            optimizer(stranger, owner="me")
        # An invite that somebody else has signed, and one to another run.
        for forged in (stranger._node.invite("r"), first._node.invite("another")):
            stranger._invites["r"] = forged
            with pytest.raises(ValueError, match="not signed by this run's owner for this run"):
                optimizer(stranger, owner=owner)
        # Saying that the run is open, or one's own, does not help either.
        for own in (False, True):
            liar = loopback_dht()
            with pytest.raises(
                ValueError, match="this run is closed and the invite is missing or not signed"
            ):
                optimizer(liar, owner=liar.peer_id if own else None)
        assert len(member.status()["peers"]) == 1


def test_the_strategys_printed_line_holds_the_invite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from potluck.lightning import HivemindStrategy

    where = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
    key = tmp_path / "owner.key"
    with DHT(identity_path=key, start=True, nat_port_map=False, **where) as dht:
        owner = str(dht.peer_id)
    strategy = HivemindStrategy(64, "r", owner=owner, identity_path=str(key), **where)
    try:
        printed = capsys.readouterr().err
        token = next(
            word for word in printed.replace("=", " ").replace("'", " ").split() if "potluck1" in word
        )
        assert _core.Node.read_token(token)[2] == strategy.dht._node.invite("r")
    finally:
        strategy.dht.shutdown()
    with pytest.raises(ValueError, match="this peer has no invite"):
        HivemindStrategy(64, "r", owner=owner, **where)
