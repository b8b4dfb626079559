"""`train` killed at any moment, and resumed: the bytes of an undisturbed run, and nothing else.

With evaluation, the best checkpoint and a moving average. One interpreter forks every run that is
killed: importing PyTorch is the slow part.
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
import json, os, random, signal, sys, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = spec_from_file_location("training_test", sys.argv[1])
test = module_from_spec(spec)
spec.loader.exec_module(test)
from fastgoal_models.checkpoints import complete_checkpoints, latest_checkpoint, load_checkpoint
from fastgoal_models.training import Evaluation, best_checkpoint, read_evaluations, read_log

home = Path(sys.argv[2])
items = test.make_items()
model = test.make_model()
# The moving average copies the model: without the half million words that never change.
type(model.tokenizer).__deepcopy__ = lambda self, memo: self

def measure(model):
    "The best is somewhere in the middle; random numbers are drawn, which must change nothing."
    torch.rand(3), random.random()
    score = sum(p.detach().double().sum() for p in model.parameters()).mul(1e4).sin().item()
    return score, {"mean_r1": score}

def start(out, steps, before=lambda: None):
    child = os.fork()
    if child == 0:
        try:
            before()
            resume = latest_checkpoint(out / "checkpoints") is not None
            config = test.make_config(
                out, steps=steps, save_every=3, eval_every=2, keep_best=True, ema=0.9
            )
            test.train(
                model, items, config, device="cpu", resume=resume,
                evaluation=Evaluation("set", measure),
            )
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

def result(out):
    "All that a run leaves, without the seconds that it took."
    log = test.without_time(read_log(out))
    judged = [record._replace(seconds=0.0) for record in read_evaluations(out)]
    saved = {}
    for path in complete_checkpoints(out / "checkpoints"):
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        saved[path.name] = files
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return {"log": log, "eval": judged, "best": (out / "best.json").read_text(),
            "checkpoints": saved, "names": names}

def undisturbed(steps):
    test.train(test.make_model(), items, test.make_config(home / f"imports {steps}", steps=1))
    out = home / f"undisturbed {steps}"
    began = time.perf_counter()
    assert wait(start(out, steps)) == 0
    found = result(out)
    last = json.loads(found["best"])["step"]
    assert last < steps, "the best checkpoint of this test should not be the last one"
    return found, time.perf_counter() - began

def check(out):
    "What has a name of its own is whole, and what is named is there."
    for path in complete_checkpoints(out / "checkpoints"):
        load_checkpoint(path)
    if (out / "best.json").exists():
        assert best_checkpoint(out) is not None

def check_finished(out, wanted):
    check(out)
    found = result(out)
    for name in wanted:
        assert found[name] == wanted[name], (name, out, found["names"])
"""
)

AT_RANDOM = """
STEPS = 12
wanted, seconds = undisturbed(STEPS)
rng, exits, finished, resumed = random.Random(0), [], 0, 0
out = home / "random 0"
while exits.count(-signal.SIGKILL) < 20:
    resumed += latest_checkpoint(out / "checkpoints") is not None
    child = start(out, STEPS)
    time.sleep(rng.uniform(0.02, 0.7) * seconds)
    os.kill(child, signal.SIGKILL)
    exits.append(wait(child))
    check(out)
    if exits[-1] == 0:  # it was faster
        check_finished(out, wanted)
        finished += 1
        out = home / f"random {finished}"
    assert exits[-1] in (0, -signal.SIGKILL) and len(exits) < 80, exits
assert wait(start(out, STEPS)) == 0
check_finished(out, wanted)
assert resumed >= 5, "hardly a run of this test was gone on with"
print(json.dumps(exits))
"""

AT_EVERY_FILE = (
    DIE_AT
    + """
STEPS = 4
wanted, _ = undisturbed(STEPS)
exits = []
while not exits or exits[-1] == -signal.SIGKILL:
    out = home / f"event {len(exits)}"
    exits.append(wait(start(out, STEPS, die_at(len(exits) + 1, out))))
    check(out)
    assert wait(start(out, STEPS)) == 0
    check_finished(out, wanted)
print(json.dumps(exits))
"""
)


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return exits_of(COMMON + AT_RANDOM + AT_EVERY_FILE, "test_training.py", folder, 400)


def test_killed_twenty_times_at_random(exits):
    assert exits[0].count(-signal.SIGKILL) == 20


def test_killed_at_every_file_it_touches(exits):
    assert exits[1] == [-signal.SIGKILL] * (len(exits[1]) - 1) + [0]
    assert len(exits[1]) > 20  # the logs, best.json, and checkpoints with three files each
