"""Whatever strangers put into records and states: what cannot be used is refused in words, and changes nothing."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_optimizer import backward, batches, equal, make_model, see_each_other

import potluck
from potluck._state import StateCodec
from potluck.averaging import DecentralizedAverager
from potluck.compression import Float16Compression, NoCompression, Uniform8BitQuantization
from potluck.dht import DHT
from potluck.lightning._roster import _Record
from potluck.optim import TrainingAverager, TrainingStateAverager
from potluck.utils import BatchTensorDescriptor, MSGPackSerializer

CASES = 2000
INF = math.inf
ODD = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 2**63, 2**64 - 1, 2**80, 10**400),
    *(0.0, -0.5, 1e308, INF, -INF, math.nan, "", "x", "1", "inf", "float32", "qint8", "step", "\n"),
]


def anything(chance: random.Random, depth: int = 0) -> Any:
    """A value of any kind, also in the forms in which states write theirs."""
    kind = chance.randrange(9) if depth < 4 else 0
    if kind < 5:
        return chance.choice(ODD)
    items = [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 5:
        return items
    if kind == 6:
        return {str(chance.choice(ODD)): item for item in items}
    form = chance.choice(["list", "tuple", "dict", "own", "value", "dtype", "shape", "other"])
    return {form: [[chance.choice(ODD), item] for item in items] if kind == 7 else items}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, item in items for way in places(item, (*path, key)))]


def changed(chance: random.Random, value: Any) -> Any:
    """A copy with one thing in it replaced, left out or there twice."""
    value = json.loads(json.dumps(value))
    *way, last = chance.choice(places(value)[1:] or [("x",)])
    inner = value
    for key in way:
        inner = inner[key]
    how = chance.randrange(4)
    if not isinstance(inner, (dict, list)) or last == "x":
        return anything(chance)
    if how == 0:
        del inner[last]
    elif how == 1 and isinstance(inner, list):
        inner.insert(last, inner[last])
    elif how == 1:
        inner[str(chance.choice([*ODD, "step", "optimizer", "get_lr", "7", "0.lr"]))] = inner[last]
    else:
        inner[last] = anything(chance)
    return value


def damaged(chance: random.Random, raw: bytes) -> bytes:
    """One byte or some more of it replaced, left out or added."""
    at, some = chance.randrange(len(raw) + 1), chance.randbytes(chance.choice([1, 1, 1, 4, 40]))
    return raw[:at] + chance.choice([some, b""]) + raw[at + chance.choice([0, 1, len(some)]) :]


# Records of the roster.


def test_any_value_is_a_sane_record_or_none() -> None:
    chance, found = random.Random(1), 0
    valid = [[3, 0, None], [0, 1, [5, [0.1, 0.2]]], [7, -1, [0, [1.0]]]]
    values = [anything(chance) for _ in range(CASES)]
    values += [changed(chance, chance.choice(valid)) for _ in range(CASES)]
    values += [[odd, 0, [odd, [odd]]] for odd in ODD] + [[1, 0, [1, [0.5] * 100_000]]]
    for value in [*valid, *values]:
        record = _Record.decode(value)
        if record is None:
            continue
        found += 1
        # What a newcomer takes for itself can be sent.
        MSGPackSerializer.dumps([1 + record.number, record.choice])
        if record.plan is not None:
            assert 0 <= record.plan.epoch < 2**63 and len(record.plan.rates) <= 8192
            assert all(isinstance(rate, float) and 0 <= rate < INF for rate in record.plan.rates)
    assert found > 100 and all(_Record.decode(value) is not None for value in valid)


# Values of the DHT.


def nested(depth: int, ending: bytes = b"\xc0") -> bytes:
    """Tuples within tuples."""
    raw = ending
    for _ in range(depth):
        raw = MSGPackSerializer.dumps(_Raw(b"\x91" + raw))
    return raw


class _Raw:
    def __init__(self, raw: bytes):
        self.raw = raw

    def packb(self) -> bytes:
        return self.raw


@pytest.fixture(autouse=True)
def raw_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MSGPackSerializer._packers, _Raw, MSGPackSerializer._TUPLE)


def test_any_bytes_are_a_value_or_a_value_error() -> None:
    chance, found = random.Random(2), 0
    described = BatchTensorDescriptor(4, 3, dtype=torch.float16, device=torch.device("cpu"))
    valid = [
        MSGPackSerializer.dumps(value)
        for value in ((1, (2, "x")), {"a": [1.5, None, b"y"], 3: (True,)}, described, [described, {(1,): 2}])
    ]
    sizes = [[INF], [0, INF], [0, math.nan], {"x": 1}, [0, -1], [0, 2**63], "text"]
    fields = [{"size": size} for size in sizes] + [
        {"size": [0, 1], name: value}
        for name in ("dtype", "layout", "device")
        for value in [*ODD[:11], *ODD[13:], "onnx", "_dynamo", "torch.strided", "cpu:99999999999999", [1]]
    ]
    odd = [MSGPackSerializer.dumps(_Raw(MSGPackSerializer.dumps(inner))) for inner in (1, "text", {1: 2}, [])]
    odd += [
        b"\xc8" + len(raw).to_bytes(2, "big") + b"\x51" + raw for raw in map(MSGPackSerializer.dumps, fields)
    ]
    odd += [
        b"\x91" * 2000 + b"\xc0",
        b"\xc7\x00\xff",
        b"\xd4\xfe\x01",
        b"\x81\x90\x01",
        b"\xdd\xff\xff\xff\xff",
    ]
    cases = [*valid, *odd, *(chance.randbytes(chance.randrange(40)) for _ in range(CASES))]
    cases += [damaged(chance, chance.choice(valid)) for _ in range(CASES)]
    for raw in cases:
        try:
            MSGPackSerializer.loads(raw)
        except ValueError:
            continue
        found += 1
    assert found > 100 and all(MSGPackSerializer.loads(raw) for raw in valid)


def test_tuples_are_read_as_deep_as_the_rust_side_reads_them_and_no_deeper() -> None:
    """msgpack itself would use up the stack, and with it the process."""
    value = MSGPackSerializer.loads(nested(31))
    for _ in range(31):
        (value,) = value
    assert value is None
    for depth in (33, 300, 12_000):
        with pytest.raises(ValueError, match=r"nested deeper than 32$"):
            MSGPackSerializer.loads(nested(depth))
    assert MSGPackSerializer.loads(nested(31)), "the depth is that of one value"


def test_a_class_that_fails_to_read_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless:
        @staticmethod
        def unpackb(raw: bytes) -> Any:
            return {}[raw]

    monkeypatch.setitem(MSGPackSerializer._unpackers, 0x11, Careless)
    with pytest.raises(ValueError, match="extension 17: KeyError"):
        MSGPackSerializer.loads(b"\xd4\x11\x00")


# States.


def sequence(optimizer: torch.optim.Optimizer) -> Any:
    schedules = torch.optim.lr_scheduler
    parts = [schedules.StepLR(optimizer, 2), schedules.ExponentialLR(optimizer, 0.5)]
    return schedules.SequentialLR(optimizer, parts, [3])


FORMS: dict[str, tuple[Any, Any, Any]] = {
    "adam": (
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.lr_scheduler.StepLR, step_size=2),
        NoCompression(),
    ),
    "sgd, a sequence, float16": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        sequence,
        Float16Compression(),
    ),
    "lr that is a tensor, lambda, 8 bits": (
        lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1)),
        lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda epoch: 0.5**epoch),
        Uniform8BitQuantization(),
    ),
}


class Model:
    """Parameters, optimizer, schedule and a further tensor, with so many steps made."""

    def __init__(self, form: str, steps: int):
        make, schedule, compression = FORMS[form]
        self.layer = torch.nn.Linear(3, 2)
        self.extra = torch.zeros(4, dtype=torch.int64)
        self.optimizer = make(self.layer.parameters())
        self.scheduler = schedule(self.optimizer)
        self.codec = StateCodec(
            self.optimizer, list(self.layer.parameters()), [self.extra], self.scheduler, compression
        )
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.layer(torch.ones(3)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def everything(self) -> Any:
        attributes = {name: value for name, value in vars(self.scheduler).items() if name != "optimizer"}
        state = {**self.scheduler.state_dict(), **attributes}
        return bits([list(self.layer.parameters()), self.extra, self.optimizer.state_dict(), state])


def bits(value: Any) -> Any:
    """What can be compared, to the last bit and type."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else (type(value), repr(value))


def sent(model: Model) -> tuple[dict[str, str], dict[str, bytes]]:
    """As it arrives elsewhere."""
    meta, blobs = model.codec.capture()
    return meta, {name: bits(t)[2] for name, t in blobs.items()}


def spoilt(
    chance: random.Random, meta: dict[str, str], blobs: dict[str, bytes]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """With one thing changed."""
    meta, blobs, how = dict(meta), dict(blobs), chance.randrange(8)
    fact, blob = chance.choice(sorted(meta)), chance.choice(sorted(blobs))
    if how == 0:
        del meta[fact]
    elif how == 1:
        meta[fact] = json.dumps(anything(chance))
    elif how == 2:
        meta[fact] = damaged(chance, meta[fact].encode()).decode(errors="replace")
    elif how == 3:
        blobs[blob] = damaged(chance, blobs[blob])
    elif how == 4:
        blobs[blob] = blobs.pop(chance.choice(sorted(blobs)))
    else:
        meta[fact] = json.dumps(changed(chance, json.loads(meta[fact])))
    return meta, blobs


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_cannot_be_used_changes_nothing(form: str) -> None:
    chance, (meta, blobs) = random.Random(3), sent(Model(form, 4))
    mine, taken, refused = Model(form, 1), 0, 0
    before = mine.everything()
    for case in range(CASES // 2):
        spoilt_meta, spoilt_blobs = spoilt(chance, meta, blobs)
        try:
            mine.codec.restore(spoilt_meta, spoilt_blobs)
        except ValueError:
            refused += 1
            assert mine.everything() == before, (case, spoilt_meta)
        else:
            # What was changed is of no consequence, or a number like any other.
            taken, mine = taken + 1, Model(form, case % 3)
            before = mine.everything()
    assert taken > 50 and refused > 200
    mine.codec.restore(meta, blobs)
    assert bits(mine.optimizer.state_dict()["param_groups"]) != before[2]["param_groups"]
    mine.step()


def replaced(fact: str, *way: Any) -> Callable[[dict[str, str]], None]:
    """Puts the last thing to where the others lead, in a fact."""

    def change(meta: dict[str, str]) -> None:
        value = json.loads(meta[fact])
        inner = value
        for key in way[:-2]:
            inner = inner[key]
        inner[way[-2]] = way[-1]
        meta[fact] = json.dumps(value)

    return change


HOSTILE: dict[str, tuple[Any, str]] = {
    "deep": (lambda meta: meta.update(optimizer="[" * 100_000), "no valid optimizer: RecursionError"),
    "deep value": (
        replaced("scheduler", "gamma", json.loads('{"list": [' * 40 + "1" + "]}" * 40)),
        "scheduler, 'gamma': nested deeper than 32",
    ),
    "entries": (replaced("optimizer", "0", 5), "parameter 0: no statistics: 5"),
    "fact": (replaced("optimizer", "0", "exp_avg", 5), "opt.0.exp_avg: no description of a tensor: 5"),
    "no dtype": (
        replaced("optimizer", "0", "exp_avg", {"shape": [2, 3]}),
        "exp_avg: unknown element type None",
    ),
    # torch makes a tensor of it that ends the process when it is copied.
    "crash": (
        replaced("optimizer", "0", "exp_avg", {"dtype": "qint8", "shape": [24]}),
        "unknown element type 'qint8'",
    ),
    "negative": (replaced("optimizer", "0", "exp_avg", "shape", [-2, -3]), "no shape of a tensor"),
    "fraction": (replaced("optimizer", "0", "exp_avg", "shape", [2.5, 3]), "no shape of a tensor"),
    "huge": (replaced("optimizer", "0", "exp_avg", "shape", [0, 2**40, 2**40]), "too large for a tensor"),
    "other shape": (
        replaced("optimizer", "0", "exp_avg", "shape", [3, 2]),
        r"expected \(2, 3\), found \(3, 2\)",
    ),
    "statistic": (replaced("optimizer", "0", "step", {"value": "x"}), "'x' cannot take the place of tensor"),
    "line": (
        replaced("optimizer", "0", "a\nb", {"value": 1}),
        r"parameter 0: no name of a statistic: 'a\\nb'",
    ),
    "index": (replaced("optimizer", "7", {}), "has parameter '7', this optimizer has 2"),
    "group": (replaced("param_groups", 0, 5), "parameter group 0: no settings: 5"),
    "two keys": (
        replaced("param_groups", 0, "lr", {"list": [], "dict": []}),
        "parameter group 0, lr: no value",
    ),
    "key": (replaced("param_groups", 0, "lr", {"dict": [[[1], 2]]}), "parameter group 0, lr: no value"),
    "text": (replaced("param_groups", 0, "lr", "x"), "lr: 'x' cannot take the place of 0"),
    "betas": (replaced("param_groups", 0, "betas", {"tuple": [0.9]}), "cannot take the place of"),
    "number": (replaced("param_groups", 0, "lr", 10**400), "a number that is too large"),
    "method": (replaced("scheduler", "step", 5), "scheduler, 'step': no part of a scheduler's state"),
    "owner": (replaced("scheduler", "optimizer", 5), "scheduler, 'optimizer': no part"),
    "epoch": (replaced("scheduler", "last_epoch", INF), "cannot take the place of"),
    "type": (
        replaced("tensors", "param.000000", "dtype", "int32"),
        "expected .* of torch.float32, found .* of torch.int32",
    ),
    "schedule": (lambda meta: meta.update(scheduler="5"), "the state's scheduler is a int, not a dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_state_is_refused_in_words(case: str) -> None:
    spoil, message = HOSTILE[case]
    meta, blobs = sent(Model("adam", 4))
    spoil(meta)
    mine = Model("adam", 2)
    before = mine.everything()
    with pytest.raises(ValueError, match=message):
        mine.codec.restore(meta, blobs)
    assert mine.everything() == before
    mine.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_no_numbers_are_refused(value: float) -> None:
    donor, mine = Model(next(iter(FORMS)), 2), Model(next(iter(FORMS)), 1)
    before = mine.everything()
    with torch.no_grad():
        next(iter(donor.layer.parameters())).view(-1)[0] = value
    with pytest.raises(ValueError, match=r"param\.000000: not all of its values are finite"):
        mine.codec.restore(*sent(donor))
    assert mine.everything() == before


def test_settings_of_another_kind_that_work_alike_are_taken() -> None:
    """What differs between programs and versions that train together is no reason to refuse."""
    meta, blobs = sent(Model("adam", 4))
    for change in (
        replaced("param_groups", 0, "betas", {"list": [0.5, 0.75]}),
        replaced("param_groups", 0, "foreach", True),
        replaced("param_groups", 0, "of another version", "x"),
        replaced("param_groups", 0, "weight_decay", 1),
        replaced("scheduler", "verbose", "deprecated"),
        replaced("scheduler", "_last_lr", {"own": []}),
        replaced("optimizer", "0", "step", {"value": 4}),
        replaced("optimizer", "0", "max_exp_avg_sq", {"value": None}),
        lambda meta: meta.pop("tensors"),
    ):
        change(meta)
    mine = Model("adam", 2)
    mine.codec.restore(meta, blobs)
    group = mine.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["foreach"]) == ([0.5, 0.75], 1, True)
    mine.step()
    assert mine.scheduler.last_epoch == 5


def test_what_is_said_to_be_compressed_must_be() -> None:
    form = "sgd, a sequence, float16"
    meta, blobs = sent(Model(form, 4))
    names, mine = json.loads(meta["encoded"]), Model(form, 1)
    before = mine.everything()
    for encoded, matching in (
        ([*names, names[0]], f"the state lacks '{names[0]}'"),
        ([{}], "the state lacks {}"),
        (["extra.000000"], "'extra.000000': "),
    ):
        with pytest.raises(ValueError, match=matching):
            mine.codec.restore({**meta, "encoded": json.dumps(encoded)}, blobs)
    with pytest.raises(ValueError, match=f"'{names[0]}': "):
        mine.codec.restore(meta, {**blobs, names[0]: blobs[names[0]][:-1]})
    assert mine.everything() == before


@pytest.mark.parametrize("last", ["optimizer", "scheduler"])
def test_what_fails_half_way_is_put_back(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of the program's own may change what is there, and fail then."""
    mine, (meta, blobs) = Model("adam", 1), sent(Model("adam", 4))
    before, owner = mine.everything(), getattr(mine, last)
    load, calls = owner.load_state_dict, []

    def fails(state: Any) -> None:
        if calls:
            return load(state)
        calls.append(state)
        mine.optimizer.param_groups[0]["lr"] = 7.0
        mine.optimizer.param_groups[0]["new"] = 7.0
        next(iter(mine.optimizer.state.values()))["step"] = 7
        if last == "scheduler":
            owner.gamma, owner.new = 7.0, 7.0
        raise KeyError("hook")

    monkeypatch.setattr(type(owner), "load_state_dict", lambda _, state: fails(state))
    with pytest.raises(ValueError, match=r"does not take the state: KeyError\('hook'\)"):
        mine.codec.restore(meta, blobs)
    assert calls and mine.everything() == before


# What the peer does then.


class Offering:
    """A session that finds a state of others where it has nothing to do."""

    def __init__(self, inner: Any, meta: dict[str, str], blobs: dict[str, bytes]):
        self._inner, self._state = inner, (3, meta, blobs)
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self, samples: int) -> str:
        action = self._inner.step(samples)
        return "load_state" if action == "accumulate" else action

    def catch_up(self) -> Any:
        return "state", self._state

    def load_state(self, seconds: float | None = None) -> Any:
        return self._state

    def refuse_state(self, reason: str, kept: bool) -> None:
        self.refused.append(reason)


def test_training_goes_on_beside_a_state_that_does_not_fit(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture
) -> None:
    """Also the samples that were gathered before stay, so it is plain torch to the bit."""
    caplog.set_level(logging.WARNING, "potluck")
    data, reference, model = batches(8, 8), make_model(), make_model()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for index, (x, y) in enumerate(data):
        backward(reference, x, y)
        if index % 2 == 1:
            for parameter in reference.parameters():
                parameter.grad /= 2
            plain.step()
            plain.zero_grad()
    with potluck.Optimizer(
        dht=local_dht(),
        run_id="r",
        target_batch_size=16,
        batch_size_per_step=8,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ) as opt:
        meta, blobs = opt._codec.capture()
        session = Offering(opt._session, {**meta, "param_groups": '[{"lr": "x"}]'}, {**blobs})
        opt._session = session
        for x, y in data:
            backward(model, x, y)
            opt.step()
            opt.zero_grad()
        opt.load_state_from_peers()
        assert opt.local_epoch == 4
    assert equal(reference, model)
    assert len(session.refused) > 4 and len(set(session.refused)) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert said[0].startswith(
        "r: the state of epoch 3 that others have does not fit, and this peer keeps its own: "
    )


def test_a_newcomer_trains_on_beside_a_state_that_has_gone_bad(
    loopback_dht: Callable[..., DHT], caplog: pytest.LogCaptureFixture
) -> None:
    """Over real sockets: it says once what is wrong with the state, keeps its own, and reaches epochs of its own."""
    caplog.set_level(logging.WARNING, "potluck")

    def peer(model: torch.nn.Module) -> potluck.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return potluck.Optimizer(
            dht=loopback_dht(), run_id="r", target_batch_size=16, batch_size_per_step=8, optimizer=optimizer
        )

    def train(opt: potluck.Optimizer, model: torch.nn.Module, epochs: int) -> None:
        end = opt.local_epoch + epochs
        while opt.local_epoch < end:
            for x, y in batches(2, 8):
                backward(model, x, y)
                opt.step()
                opt.zero_grad()

    models = [make_model(0), make_model(1)]
    donor = peer(models[0])
    train(donor, models[0], 3)
    with torch.no_grad():
        next(models[0].parameters()).fill_(math.nan)
    donor._publish()
    newcomer = peer(models[1])
    before = [parameter.detach().clone() for parameter in models[1].parameters()]
    see_each_other([newcomer, donor])
    newcomer.load_state_from_peers()
    assert newcomer.local_epoch == 0
    assert all(torch.equal(a, b) for a, b in zip(models[1].parameters(), before, strict=True))
    said = [record.getMessage() for record in caplog.records if "keeps its own" in record.getMessage()]
    assert len(said) == 1 and "not all of its values are finite" in said[0], caplog.text
    train(newcomer, models[1], 2)
    assert donor.local_epoch == 3
    for opt in (newcomer, donor):
        opt.shutdown()


AVERAGERS: dict[str, Callable[[torch.nn.Module, DHT], DecentralizedAverager]] = {
    "tensors": lambda model, dht: DecentralizedAverager(
        list(model.parameters()), dht, prefix="s", start=True
    ),
    "state": lambda model, dht: TrainingStateAverager(
        dht=dht, prefix="s", start=True, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    ),
    "training": lambda model, dht: TrainingAverager(
        torch.optim.SGD(model.parameters(), lr=0.1),
        average_parameters=True,
        average_gradients=False,
        dht=dht,
        prefix="s",
        start=True,
    ),
}


@pytest.mark.parametrize("kind", AVERAGERS)
def test_an_averager_keeps_its_own(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    model, same = make_model(), make_model()
    averager = AVERAGERS[kind](model, local_dht())
    facts, tensors, _ = averager.get_current_state()
    names = facts.pop("names", [f"tensor.{i:06}" for i in range(len(tensors))])
    good = {name: str(value) for name, value in facts.items()} if kind != "tensors" else {"facts": "{}"}
    blobs = {name: bits(t + 1)[2] for name, t in zip(names, tensors, strict=True)}
    spoilt = [({**good, fact: text}, blobs) for fact in good for text in ("", "[", "-1")]
    spoilt += [(good, {**blobs, names[-1]: blobs[names[-1]][:-1]}), ({**good, "encoded": "[5]"}, blobs)]
    for meta, values in spoilt:
        session = Offering(averager.session, meta, values)
        averager._session = session
        caplog.clear()
        assert averager.load_state_from_peers() is None
        assert len(session.refused) == 1 and equal(model, same)
        said = [record.getMessage() for record in caplog.records]
        assert said == [
            f"s: the state that others have does not fit, and this peer keeps its own: {session.refused[0]}"
        ]
        averager._session = session._inner
    averager._session = Offering(averager.session, good, blobs)
    assert averager.load_state_from_peers() is not None
    assert kind == "training" or not equal(model, same)
    averager.shutdown()
