"""The seed document's three programs: its own code, and they join each other by what they print."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_support import environment, on_machine
from pasted import Peer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# The code blocks of the seed document, as published, with the import that its second block forgets.
SEED = {
    "float16": """
from hivemind import Float16Compression
from pytorch_lightning import Trainer
from lightning_hivemind.strategy import HivemindStrategy

trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=target_batch_size,
        grad_compression=Float16Compression(),
        state_averaging_compression=Float16Compression(),
    ),
    accelerator="gpu",
    devices=1,
)
""",
    "size_adaptive": """
from hivemind import Float16Compression, SizeAdaptiveCompression, Uniform8BitQuantization
from pytorch_lightning import Trainer
from lightning_hivemind.strategy import HivemindStrategy

# compresses values above threshold with 8bit Quantization, lower with Float16
compression = SizeAdaptiveCompression(
    threshold=2 ** 16 + 1, less=Float16Compression(), greater_equal=Uniform8BitQuantization()
)
trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=target_batch_size,
        grad_compression=compression,
        state_averaging_compression=compression,
    ),
    accelerator="gpu",
    devices=1,
)
""",
    "powersgd": """
from pytorch_lightning import Trainer
from lightning_hivemind.strategy import HivemindStrategy
from functools import partial
from hivemind.optim.power_sgd_averager import PowerSGDGradientAverager

trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=8192,
        grad_averager_factory=partial(PowerSGDGradientAverager, averager_rank=32, min_compression_ratio=0.5),
    ),
    accelerator="gpu",
    devices=1,
)
""",
}


def statements(source: str) -> list[str]:
    """The assignments of the seed's names, normalised: without the accelerator."""
    kept = []
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign) or statement.targets[0].id not in ("compression", "trainer"):
            continue
        if statement.targets[0].id == "trainer":
            call = statement.value
            call.keywords = [k for k in call.keywords if k.arg != "accelerator"]
        kept.append(ast.dump(statement))
    return kept


def imported(source: str) -> set[str]:
    """Names that the program imports from potluck, hivemind or Lightning."""
    return {
        alias.name
        for statement in ast.parse(source).body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    } - {"LightningModule"}


def seed_imports(name: str) -> str:
    """The example with the imports of the seed in place of its own."""
    source = (EXAMPLES / f"{name}.py").read_text()
    without = re.sub(r"^from (potluck|pytorch_lightning|functools).*\n", "", source, flags=re.M)
    own = "".join(line + "\n" for line in SEED[name].splitlines() if line.startswith("from "))
    module = "from pytorch_lightning import LightningModule\n"
    return without.replace("import common\n", "import common\n" + own + module)


@pytest.mark.parametrize("name", SEED)
def test_an_example_is_the_seed_but_for_imports_and_accelerator(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert statements(source) == statements(SEED[name])
    assert imported(source) == imported(SEED[name])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", SEED)
def test_an_example_is_joined_by_pasting_what_it_prints(
    name: str, tmp_path: Path, machines: list[list[str]]
) -> None:
    """On two machines, as the README says: both show two peers, Ctrl-C ends one, and the other goes on."""
    for file in ("common.py", f"{name}.py"):
        (tmp_path / file).write_text((EXAMPLES / file).read_text())
    more_often = () if name == "powersgd" else ("--target-batch-size", "1024")
    command = shlex.join(["python", f"{name}.py", *more_often])
    peers = [Peer(on_machine(machines[0], command, tmp_path))]
    try:
        line = peers[0].wait_for(r"\n\s+((POTLUCK_TOKEN|INITIAL_PEERS)=.*)\n").group(1)
        peers.append(Peer(on_machine(machines[1], line, tmp_path)))
        for peer in peers:
            peer.wait_for(r"peers=2.*epoch_of_run=[1-9]")
        # Lightning's own answer to Ctrl-C is to tear down and exit with 1.
        assert peers[1].ctrl_c() == 1
        alone = peers[0].wait_for(r"peers=1\.0.*epoch_of_run=(\d+)", since=len(peers[0].said))
        peers[0].wait_for(rf"peers=1\.0.*epoch_of_run={int(alone.group(1)) + 1}")
        assert peers[0].ctrl_c() == 1
    finally:
        for peer in peers:
            peer.kill()
    assert not re.search("LeafSpec|tensorboardX", "".join(peer.said for peer in peers))
    # The first peer writes the run's artefacts, and only it.
    assert len(list(tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt"))) == 1


RUN_ALL = """
import runpy, sys
programs = sys.argv[1:]
for program in programs:
    sys.argv = [program, "--epochs", "1"]
    runpy.run_path(program, run_name="__main__")
    print("ran", program)
"""


def test_the_seeds_own_imports_run_with_the_compat_distribution(tmp_path: Path) -> None:
    programs = [tmp_path / f"{name}.py" for name in SEED]
    for program in programs:
        program.write_text(seed_imports(program.stem))
        assert "hivemind" in program.read_text()
    compat = Path(__file__).resolve().parents[1] / "compat" / "src"
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, programs)],
        env=environment(PYTHONPATH=f"{compat}{os.pathsep}{EXAMPLES}"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == [
        f"ran {program}" for program in programs
    ]
