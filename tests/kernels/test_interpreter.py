"""The Triton kernels' meaning, without a GPU: their tests once more under Triton's interpreter.

The interpreter is chosen when Triton is imported, so it needs a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
# Test files whose kernels exist in Triton, and how many of their tests pass at least.
FILES = {
    "test_maxsim.py": 40,
    "test_maxsim_backward.py": 50,
    "test_topk.py": 10,
    "test_feature_kernels.py": 29,
    "test_token_kernels.py": 30,
    "test_text_conditioned_kernels.py": 28,
}


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version < (3, 7) and tuple(int(p) for p in np.__version__.split(".")[:2]) >= (2, 4):
        return "the interpreter of Triton before 3.7 breaks with NumPy 2.4"
    return None


@pytest.mark.interpreter
@pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
@pytest.mark.parametrize(("file", "at_least"), FILES.items())
def test_kernels_under_the_interpreter(file, at_least):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= at_least, done.stdout[-2000:]
