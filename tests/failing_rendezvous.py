"""A target whose import keeps a rank from connecting, in the first FAILING_STARTS starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sandbox.distributed.rank import Rank

_log = Path(os.environ["FAILING_STARTS_LOG"])
if os.environ["RANK"] == "1":
    with _log.open("a") as file:
        file.write("started\n")
    if len(_log.read_text().split()) <= int(os.environ["FAILING_STARTS"]):
        os.environ["GLOO_SOCKET_IFNAME"] = "nowhere"


def count(settings: Any, rank: Rank) -> int:
    rank.gather_plain(None)
    return len(_log.read_text().split())
