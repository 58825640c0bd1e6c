"""The seed document's three programs: its own code, and they join each other by what they print."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning_support import environment, paste, read_joining_line, start

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_JOIN_SECONDS = 220

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
    """The assignments of the seed's names, normalised: without the accelerator and the number of passes."""
    kept = []
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign) or statement.targets[0].id not in ("compression", "trainer"):
            continue
        if statement.targets[0].id == "trainer":
            call = statement.value
            call.keywords = [k for k in call.keywords if k.arg not in ("accelerator", "max_epochs")]
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


def finish(process: subprocess.Popen) -> str:
    """Everything that the process still prints; it must end well."""
    output, _ = process.communicate(timeout=_JOIN_SECONDS)
    assert process.returncode == 0, output
    return output


def most_peers(output: str) -> float:
    """The largest number of peers that a progress bar showed."""
    return max((float(count) for count in re.findall(r"peers=([0-9.]+)", output)), default=0)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", SEED)
def test_an_example_is_joined_by_pasting_what_it_prints(name: str, tmp_path: Path) -> None:
    options = ("--epochs", "30", *(() if name == "powersgd" else ("--target-batch-size", "1024")))
    for file in ("common.py", f"{name}.py"):
        (tmp_path / file).write_text((EXAMPLES / file).read_text())
    first = start(tmp_path / f"{name}.py", *options)
    try:
        second = paste(read_joining_line(first), tmp_path)
        try:
            # Both at once: a peer whose progress bar fills an unread pipe stops training.
            with ThreadPoolExecutor(2) as reading:
                outputs = list(reading.map(finish, (second, first)))
        finally:
            second.kill()
    finally:
        first.kill()
    assert max(most_peers(output) for output in outputs) == 2, outputs
    assert any(re.search(r"epoch_of_run=[1-9]", output) for output in outputs)
    # The first peer writes the run's artefacts; the second does once it is the last one.
    assert len(list(tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt"))) in (1, 2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SEED)
def test_the_seeds_own_imports_run_with_the_compat_distribution(name: str, tmp_path: Path) -> None:
    (tmp_path / "common.py").write_text((EXAMPLES / "common.py").read_text())
    program = tmp_path / "program.py"
    program.write_text(seed_imports(name))
    compat = Path(__file__).resolve().parents[1] / "compat" / "src"
    done = subprocess.run(
        [sys.executable, str(program), "--epochs", "1"],
        env=environment(PYTHONPATH=f"{compat}"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hivemind" in program.read_text()
