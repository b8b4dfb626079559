"""Source that the tests of killed runs put in front of their own, in a process that forks."""

import json
import subprocess
import sys
from pathlib import Path

WAIT = """
def wait(child):
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""

# Python tells of every file that is written, renamed or removed, just before it happens.
DIE_AT = """
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

def die_at(count, folder):
    def before():
        left = [count]
        def hook(event, arguments):
            reads = event == "open" and "w" not in (arguments[1] or "")
            if event in EVENTS and not reads and str(arguments[0]).startswith(str(folder)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    return before
"""


def exits_of(source: str, test: str, folder: Path, seconds: float) -> list[list[int]]:
    """How the killed runs of each part of the source ended, as it prints them.

    `test` names the file beside this one whose things the source uses, its first argument; `folder`
    is its second.
    """
    arguments = [str(Path(__file__).with_name(test)), str(folder)]
    ran = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]
