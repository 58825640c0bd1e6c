"""Whom a Lightning peer joins, and the text that it prints: nothing that was given is ignored."""

from __future__ import annotations

import shlex
import sys

import pytest

from potluck.dht import DHT
from potluck.lightning import HivemindStrategy, _joining

ADDRESS = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWPeer"
OTHER = "/dns4/seed.example.org/tcp/4001/p2p/12D3KooWOther"
FAR = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
RELAYED = "/p2p/12D3KooWRelay/p2p-circuit/p2p/12D3KooWPeer"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POTLUCK_TOKEN", "INITIAL_PEERS", "PL_INITIAL_PEERS"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_given_starts_a_run() -> None:
    assert _joining.whom_to_join(None, None) is None


@pytest.mark.parametrize(
    "given", [f"{ADDRESS},{OTHER}", f" {ADDRESS} , {OTHER},", [ADDRESS, OTHER], (ADDRESS, OTHER)]
)
def test_a_comma_separated_string_and_a_list_mean_the_same(given: object) -> None:
    assert _joining.whom_to_join(given, None) == [ADDRESS, OTHER]


@pytest.mark.parametrize("variable", ["INITIAL_PEERS", "PL_INITIAL_PEERS"])
@pytest.mark.parametrize("address", [ADDRESS, OTHER, RELAYED])
def test_both_variables_are_read(variable: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, address)
    assert _joining.whom_to_join(None, None) == [address]


def test_the_token_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_TOKEN", "potluck1abc\n")
    assert _joining.whom_to_join(None, None) == "potluck1abc"


def test_an_argument_and_the_environment_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITIAL_PEERS", OTHER)
    assert _joining.whom_to_join([OTHER], None) == [OTHER]
    for arguments in (([ADDRESS], None), (None, "potluck1abc")):
        with pytest.raises(ValueError, match="and INITIAL_PEERS name different peers"):
            _joining.whom_to_join(*arguments)
    monkeypatch.setenv("INITIAL_PEERS", "garbage")
    with pytest.raises(ValueError, match=r"INITIAL_PEERS holds 'garbage'.*or one token"):
        _joining.whom_to_join(None, "potluck1abc")


@pytest.mark.parametrize("given", ["potluck1abc", " potluck1abc\n", ["potluck1abc"]])
def test_a_token_is_taken_where_addresses_are(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _joining.whom_to_join(given, None) == "potluck1abc"
    monkeypatch.setenv("POTLUCK_TOKEN", "potluck1abc")
    assert _joining.whom_to_join(given, "potluck1abc") == "potluck1abc"
    if isinstance(given, str):
        monkeypatch.setenv("INITIAL_PEERS", given)
        assert _joining.whom_to_join(None, None) == "potluck1abc"


def test_variables_beside_a_dht_agree_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
    addresses = [str(address) for address in first.get_visible_maddrs()]
    joined, alone = DHT(addresses, start=False), DHT(start=False)
    try:
        for variable, value in (("POTLUCK_TOKEN", first.token("r")), ("INITIAL_PEERS", ",".join(addresses))):
            with monkeypatch.context() as scope:
                scope.setenv(variable, value)
                _joining.check_beside(joined)
                for other, whom in ((alone, "nobody"), (DHT([FAR], start=False), "other peers")):
                    with pytest.raises(ValueError, match=f"{variable} cannot have an effect.*joins {whom}"):
                        _joining.check_beside(other)
                scope.setenv(variable, "gar bage")
                with pytest.raises(ValueError, match=variable):
                    _joining.check_beside(alone)
        monkeypatch.setenv("POTLUCK_TOKEN", "potluck1abc")
        with pytest.raises(ValueError, match="token"):
            HivemindStrategy(8, dht=alone)
    finally:
        first.shutdown()


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="use_relay=False cannot have an effect"):
        HivemindStrategy(8, use_relay=False)


def test_two_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name different peers"):
        _joining.whom_to_join([ADDRESS], "token")
    monkeypatch.setenv("INITIAL_PEERS", ADDRESS)
    monkeypatch.setenv("PL_INITIAL_PEERS", OTHER)
    with pytest.raises(ValueError, match="INITIAL_PEERS and PL_INITIAL_PEERS name different peers"):
        _joining.whom_to_join(None, None)


@pytest.mark.parametrize(
    "value",
    ["", " , ", "192.0.2.7:4001", "/ip4/192.0.2.7/tcp/4001", f"{ADDRESS},nonsense", f"{ADDRESS} {OTHER}"],
)
def test_a_malformed_value_is_an_error_that_names_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INITIAL_PEERS", value)
    with pytest.raises(ValueError, match=r"INITIAL_PEERS (is empty|holds)"):
        _joining.whom_to_join(None, None)


@pytest.mark.parametrize("value", ["", "two words"])
def test_a_malformed_token_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="must be one token"):
        _joining.whom_to_join(None, value)


@pytest.mark.parametrize(
    "name", ["INITIAL_PEER", "PL_INITIAL_PEER", "POTLUCK_TOKN", "INTIAL_PEERS", "initial_peers"]
)
def test_a_misspelled_variable_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, ADDRESS)
    with pytest.raises(ValueError, match=f"{name} has no effect; did you mean"):
        _joining.whom_to_join(None, None)


def test_a_stranger_variable_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_LOG", "debug")
    monkeypatch.setenv("MAX_PEERS", "3")
    assert _joining.whom_to_join(None, None) is None


def test_the_printed_line_repeats_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "trains", "--name", "two words"])
    text = _joining.joining_text([ADDRESS, OTHER], None)
    line = text.splitlines()[1].strip()
    assert shlex.split(line) == [
        f"INITIAL_PEERS={ADDRESS},{OTHER}",
        "python",
        "-m",
        "trains",
        "--name",
        "two words",
    ]
    assert f"initial_peers='{ADDRESS},{OTHER}'" in text


def test_the_printed_forms_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "train.py"])
    for token in (None, "potluck1abc"):
        text = _joining.joining_text([ADDRESS], token)
        variable, _, value = shlex.split(text.splitlines()[1])[0].partition("=")
        with monkeypatch.context() as scope:
            scope.setenv(variable, value)
            from_environment = _joining.whom_to_join(None, None)
        arguments = eval("dict(" + text.splitlines()[2].partition("..., ")[2])  # the printed Python is Python
        from_argument = _joining.whom_to_join(arguments.get("initial_peers"), arguments.get("token"))
        assert from_environment == from_argument == (token or [ADDRESS])


def test_a_notebook_gets_the_argument_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "ipykernel_launcher", "-f", "kernel.json"])
    text = _joining.joining_text([ADDRESS], "potluck1abc")
    assert "HivemindStrategy(..., token='potluck1abc')" in text
    assert "ipykernel" not in text


def test_a_token_that_lost_its_end_on_the_way_is_an_error_and_no_lonely_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dht = DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False)
    try:
        token = dht.token("a-run")
    finally:
        dht.shutdown()
    for broken in (
        token[:-5],
        token[: len(token) // 2],
        "potluck1garbage",
        token.replace("potluck1", "potluck2"),
    ):
        monkeypatch.setenv("POTLUCK_TOKEN", broken)
        with pytest.raises(ValueError, match=r"token|POTLUCK_TOKEN"):
            HivemindStrategy(target_batch_size=8, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
