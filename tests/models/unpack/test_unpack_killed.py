"""`unpack` killed at every file it touches, and at random, and resumed: as if undisturbed.

One interpreter forks every run that is killed: importing PyTorch is the slow part.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.killing import DIE_AT, WAIT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]

COMMON = (
    WAIT
    + """
import json, os, random, signal, sys, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("unpack_test", sys.argv[1])
test = module_from_spec(spec)
spec.loader.exec_module(test)
test.folder.PART, test.folder._AHEAD = 4, 3

home = Path(sys.argv[2])
source = test.colours(home, number=11, a_shard=6)

def start(out, before=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            before()
            test.unpack(source, out)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

began = time.perf_counter()
assert wait(start(home / "undisturbed")) == 0
seconds = time.perf_counter() - began
wanted = test.files_in(home / "undisturbed")

def check(out):
    "What is there under a name of its own is whole."
    for name, data in test.files_in(out).items():
        if not name.startswith(".unpack/"):
            assert data == wanted[name], name
        elif name.endswith(".json") and "/." not in name:
            json.loads(data)
"""
)

AT_EVERY_FILE = (
    DIE_AT
    + """
exits = []
while not exits or exits[-1] == -signal.SIGKILL:
    out = home / f"event {len(exits)}"
    exits.append(wait(start(out, die_at(len(exits) + 1, out))))
    check(out)
    assert wait(start(out)) == 0
    assert test.files_in(out) == wanted
print(json.dumps(exits))
"""
)

AT_RANDOM = """
rng, exits = random.Random(0), []
out = home / "random 0"
while exits.count(-signal.SIGKILL) < 10:
    child = start(out)
    time.sleep(rng.uniform(0.02, 1.0) * seconds)
    os.kill(child, signal.SIGKILL)
    exits.append(wait(child))
    check(out)
    if exits[-1] == 0:  # it was faster
        assert test.files_in(out) == wanted
        out = home / f"random {len(exits)}"
    assert exits[-1] in (0, -signal.SIGKILL) and len(exits) < 60, exits
assert wait(start(out)) == 0
assert test.files_in(out) == wanted
print(json.dumps(exits))
"""


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    ran = subprocess.run(
        [sys.executable, "-c", COMMON + AT_EVERY_FILE + AT_RANDOM,
         str(Path(__file__).with_name("test_unpack_shards.py")),
         str(tmp_path_factory.mktemp("killed"))],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_killed_at_every_file_it_touches(exits):
    assert exits[0] == [-signal.SIGKILL] * (len(exits[0]) - 1) + [0]
    assert len(exits[0]) > 40  # nine pictures, three parts, their folder, the whole, its note


def test_killed_ten_times_at_random(exits):
    assert exits[1].count(-signal.SIGKILL) == 10
