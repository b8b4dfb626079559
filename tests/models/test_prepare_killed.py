"""`prepare` killed at any moment, and resumed: the bytes of an undisturbed run, and nothing else.

One interpreter forks every run that is killed: importing PyTorch is the slow part.
"""

import os
import signal

import pytest

from tests.models.killing import DIE_AT, WAIT, exits_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]

# Never a parallel product before a fork: the children would wait for threads they do not have.
COMMON = (
    WAIT
    + """
import json, os, random, signal, sys, threading, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = spec_from_file_location("prepare_test", sys.argv[1])
test = module_from_spec(spec)
spec.loader.exec_module(test)

home = Path(sys.argv[2])
data = test.make_data(home / "data")
model = test.make_model()

def start(out, before=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            before()
            test.run(data, out, test.make_matcher(model, batch_size=5))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

def fresh(name):
    (home / name).mkdir()
    return home / name / "pairs.jsonl"

def note(out):
    return out.with_name(out.name + ".provenance.json")

wanted_out = fresh("undisturbed")
began = time.perf_counter()
assert wait(start(wanted_out)) == 0
seconds = time.perf_counter() - began
wanted = [wanted_out.read_bytes(), note(wanted_out).read_bytes()]

def check(out):
    "What is there under a name of its own is whole."
    for path, whole in zip([out, note(out)], wanted):
        if path.exists():
            assert path.read_bytes() == whole, path
    for part in out.with_name(out.name + ".parts").glob("*.json"):
        try:
            json.loads(part.read_text("utf-8"))
        except FileNotFoundError:
            pass  # of a run that goes on

def check_finished(out):
    check(out)
    assert sorted(out.parent.iterdir()) == [out, note(out)], sorted(out.parent.iterdir())
"""
)

AT_RANDOM = """
rng, exits, finished = random.Random(0), [], 0
out = fresh("0")
while exits.count(-signal.SIGKILL) < 20:
    child = start(out)
    until = time.perf_counter() + rng.uniform(0.02, 1.0) * seconds
    while (left := until - time.perf_counter()) > 0:
        check(out)
        time.sleep(min(left, 0.002))
    os.kill(child, signal.SIGKILL)
    exits.append(wait(child))
    check(out)
    if exits[-1] == 0:  # it was faster, as where other work on the machine has ended
        check_finished(out)
        seconds *= 0.9
        finished += 1
        out = fresh(str(finished))
    assert exits[-1] in (0, -signal.SIGKILL) and len(exits) < 60, exits
assert wait(start(out)) == 0
check_finished(out)
print(json.dumps(exits))
"""

AT_EVERY_FILE = (
    DIE_AT
    + """
exits = []
while not exits or exits[-1] == -signal.SIGKILL:
    out = fresh(f"event {len(exits)}")
    exits.append(wait(start(out, die_at(len(exits) + 1, out.parent))))
    check(out)
    assert wait(start(out)) == 0
    check_finished(out)
print(json.dumps(exits))
"""
)


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return exits_of(COMMON + AT_RANDOM + AT_EVERY_FILE, "test_prepare.py", folder, 300)


def test_killed_twenty_times_at_random(exits):
    assert exits[0].count(-signal.SIGKILL) == 20


def test_killed_at_every_file_it_touches(exits):
    assert exits[1] == [-signal.SIGKILL] * (len(exits[1]) - 1) + [0]
    assert len(exits[1]) > 20  # four parts, their folder, the whole, its note
