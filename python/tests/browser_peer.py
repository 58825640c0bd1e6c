"""One peer of the run that the browser looks at: trains until it is killed, and says where its page is.

Arguments: the run's name, then the addresses of a peer that is there already, if any.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch

import potluck
from potluck.dht import DHT

BATCH = 8
# A pause after every batch stands for a slower device: several peers share this machine's cores, and a page is
# watched by people, to whom thousands of epochs a second would say nothing.
PAUSE_SECONDS = 0.05


def main(run_id: str, initial_peers: list[str]) -> None:
    """Train a small model on a relation that every peer knows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    generator = torch.Generator()
    generator.seed()
    dht = DHT(initial_peers=initial_peers, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    optimizer = potluck.Optimizer(
        dht=dht,
        run_id=run_id,
        target_batch_size=6 * BATCH,
        batch_size_per_step=BATCH,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        dashboard=True,
    )
    about = {
        "peer": str(dht.peer_id),
        "addresses": [str(address) for address in dht.get_visible_maddrs()],
        "url": optimizer.dashboard_url,
    }
    print(json.dumps(about), flush=True)
    for _ in itertools.count():
        x = torch.randn(BATCH, 16, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        optimizer.report_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
