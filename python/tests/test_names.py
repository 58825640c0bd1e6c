"""Users move by changing an import: every public name of hivemind is where it was, or the guide says what to use."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from api_names import MEMBERS, NAMES, SIGNATURES

from potluck.compression import NoCompression, TensorRole

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()


def replaced() -> dict[str, str]:
    """Names in the guide's table of missing mechanisms -> what to use instead."""
    section = GUIDE.split("## Names that expose a mechanism potluck does not have")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|", 1) for line in section.splitlines() if line.startswith("| `")]
    return {
        name.rpartition(".")[2]: use.strip(" |")
        for names, use in rows
        for name in re.findall(r"`([\w.]+)`", names)
    }


def holder(module: str) -> Any:
    return importlib.import_module(f"potluck.{module}".rstrip("."))


def exists(module: str, name: str) -> bool:
    try:
        getattr(holder(module), name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("module", NAMES)
def test_names_are_at_their_module_or_in_the_guide(module: str) -> None:
    names = NAMES[module].split()
    assert not [name for name in names if not exists(module, name) and not replaced().get(name)]


def resolve(path: str) -> Any:
    """``a.b.Class`` or ``Class`` under potluck."""
    parts = path.split(".")
    for at in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["potluck", *parts[:at]]))
        except ImportError:
            continue
        for name in parts[at:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def annotated(owner: type) -> set[str]:
    """Attributes that only objects have, because their constructor assigns them."""
    assigned: set[str] = set()
    for base in owner.__mro__:
        if base.__module__.startswith("potluck"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in (t for group in targets for t in ast.walk(group)):
                        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                            assigned |= {target.attr} if target.value.id == "self" else set()
    return assigned


@pytest.mark.parametrize("path", MEMBERS)
def test_classes_have_their_members(path: str) -> None:
    owner = resolve(path)
    fields = getattr(owner, "__dataclass_fields__", {})
    missing, no_methods = [], []
    for name in MEMBERS[path].split():
        method = name.endswith("()")
        name = name.removesuffix("()")
        if method and hasattr(owner, name):
            no_methods += [] if callable(getattr(owner, name)) else [name]
        elif method or not (hasattr(owner, name) or name in fields or name in annotated(owner)):
            missing += [] if replaced().get(name) else [name]
    assert not missing and not no_methods


def parameters_of(text: str) -> list[tuple[str, Any, bool]]:
    """Name, default and whether by name only, of the arguments in ``text``."""
    scope = {"NoCompression": NoCompression, "TensorRole": TensorRole}
    made = eval(f"lambda {' '.join(text.split())}: None", scope)
    return described(inspect.signature(made))


def described(signature: inspect.Signature) -> list[tuple[str, Any, bool]]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        (p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
        if p.kind not in kinds and p.name != "self"
    ]


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_have_their_names_order_and_defaults(path: str) -> None:
    expected, owner = parameters_of(SIGNATURES[path]), resolve(path)
    target = owner.__init__ if inspect.isclass(owner) else owner
    actual = described(inspect.signature(target))
    positional = [p for p in expected if not p[2]]
    assert [p[0] for p in actual[: len(positional)]] == [p[0] for p in positional]
    known = {name: (default, only) for name, default, only in actual}
    for name, default, _ in expected:
        assert name in known, name
        # An argument that hivemind demands may have a default here.
        assert default in (inspect.Parameter.empty, known[name][0]), f"{name}: {known[name][0]!r}"


def test_the_guide_lists_only_what_is_missing() -> None:
    there = {name for module, names in NAMES.items() for name in names.split() if exists(module, name)}
    assert not sorted(there & replaced().keys())
    assert len(replaced()) > 20
