"""The measurements. Each yields rows; systems take turns in one run, so that a busy machine is busy for both."""

from suites.allreduce import allreduce
from suites.codecs import codecs
from suites.growth import growth
from suites.lookups import lookups
from suites.shaped import shaped
from suites.simulator import simulator
from suites.state import state
from suites.training import end_to_end, faults, idle, overhead
from suites.wire import wire

SUITES = {
    "codecs": codecs,
    "allreduce": allreduce,
    "overhead": overhead,
    "shaped": shaped,
    "end_to_end": end_to_end,
    "faults": faults,
    "state": state,
    "idle": idle,
    "dht": lookups,
    "growth": growth,
    "simulator": simulator,
    "wire": wire,
}
