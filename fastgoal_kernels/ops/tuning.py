"""Which tile a kernel runs with: the first of a table, or, if asked, the fastest of it.

With FASTGOAL_AUTOTUNE=1 a kernel that meets a new kind of problem runs every tile of its table a
few times, keeps the fastest, and remembers it on disk for the next process, under
FASTGOAL_CACHE_DIR (default: ~/.cache/fastgoal). A kind is a device, a Triton, a dtype, a width and
sizes up to a power of two, so ragged batches do not tune again and again. A result depends on the
tile in its last bit: with tuning on, two machines, or two empty caches, may differ there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from statistics import median

import torch
import triton

from .tiles_triton import Config

# Read once, at import, as every setting is.
_ASKED = os.environ.get("FASTGOAL_AUTOTUNE", "0") == "1"
_DEFAULT_FOLDER = Path.home() / ".cache" / "fastgoal"
_FOLDER = Path(os.environ.get("FASTGOAL_CACHE_DIR") or _DEFAULT_FOLDER)

_WARM_UP_RUNS, _TIMED_RUNS = 2, 5

# What this process knows: kind -> tile.
_chosen: dict[str, Config] = {}


def size_class(size: int) -> int:
    """The same number for all sizes up to a power of two."""
    return (size - 1).bit_length() if size > 0 else 0


def choose_config(
    kernel: str,
    kind: Sequence[Hashable],
    table: Sequence[Config],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The tile for this launch: table[0] unless tuning is asked for.

    Args:
        kernel: its name.
        kind: all that may change which tile is fastest, sizes as `size_class`.
        table: the tiles to try, the default first.
        launch: runs the kernel with a tile, on the real inputs; may be called any number of times.
    """
    if not _ASKED or device.type != "cuda" or len(table) == 1:
        return table[0]
    name = torch.cuda.get_device_name(device)
    key = "; ".join(map(str, (kernel, name, f"Triton {triton.__version__}", *kind)))
    if key not in _chosen:
        known = _read().get(key)
        remembered = [config for config in table if vars(config) == known]
        if remembered:
            _chosen[key] = remembered[0]
        elif torch.cuda.is_current_stream_capturing():
            return table[0]  # a graph can not be timed while it is recorded
        else:
            _chosen[key] = _fastest(table, launch)
            _remember(key, _chosen[key])
    return _chosen[key]


def _fastest(table: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    times = {}
    for config in table:
        try:
            times[config] = _milliseconds(lambda config=config: launch(config))
        except triton.runtime.errors.TritonError:
            continue  # this device has no room for it
    return min(times, key=times.__getitem__) if times else table[0]


def _milliseconds(run: Callable[[], object]) -> float:
    for _ in range(_WARM_UP_RUNS):
        run()
    times = []
    for _ in range(_TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _path() -> Path:
    return _FOLDER / "tiles.json"


def _read() -> dict[str, dict]:
    """What earlier processes found; nothing if there is no file, or one that is no such file."""
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, config: Config) -> None:
    """Add to the file. Of processes that write at once the last wins; the others tune again."""
    found = {**_read(), key: vars(config)}
    partial = _path().with_suffix(f".{os.getpid()}")
    try:
        _FOLDER.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        partial.replace(_path())
    except OSError:
        pass  # a disk that can not be written costs the next process its time, not this one's run
