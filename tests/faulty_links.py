"""Links between islands that can be cut, and that damage what they carry; where islands are processes, a plugin of the run.

A file, whose path is in the environment variable LINKS, says what is wrong; it may change at any time:

    {"cut": [["island-0", "island-2"]],   pairs that do not reach each other
     "silent": true,                      cut links swallow what is sent, instead of being reset
     "damaged": {"island-1": 3},          so many messages of an island in all arrive damaged
     "absent": ["island-2"],              islands that do not start yet
     "pace_s": 0.2,                       what each step takes longer
     "crawl": [400, 2.0]}                 from which step on it is what instead
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_place = threading.local()
_damaged: Counter[str] = Counter()


class Links:
    """What is wrong with the links, for those that break them and those that use them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, **facts: Any) -> None:
        # Islands that are threads may set the same at once.
        part = self.path.with_name(f"{self.path.name}.{threading.get_ident()}.part")
        part.write_text(json.dumps(self.get() | facts))
        part.rename(self.path)

    def get(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def is_cut(self, a: str, b: str) -> bool:
        return any({a, b} == set(pair) for pair in self.get().get("cut", ()))


def install(links: Links, replace: Callable[[Any, str, Any], None]) -> None:
    """Puts faulty links in the place of those that islands talk over.

    Args:
        links: what is wrong with them.
        replace: `setattr`, or one that is undone after a test.
    """
    from factory_train.distributed import exchange, reach

    _damaged.clear()
    plain_wire, enter, hail = exchange.GlooWire, exchange.Exchange._enter, reach.Reach.hail

    class FaultyWire(plain_wire):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any, meet: Any = None, *, pinned: bool = False) -> None:
            self._island, self._others = _place.island, [name for name in _place.members if name != _place.island]
            self._is_closed = self._sends_parts = False
            self._group, self._closing, self._patience_s = None, threading.Lock(), timeout.total_seconds()
            self._look((meet or timeout).total_seconds())
            super().__init__(store, rank, size, timeout, meet, pinned=pinned)

        def close(self) -> None:
            # As with a real one, who waits in it finds out at once.
            self._is_closed = True
            super().close()

        def all_to_all(self, received: Any, sent: Any, meanwhile: Any = lambda: None) -> None:
            self._look(self._patience_s)
            # Parts and results take turns; it is parts that are damaged.
            self._sends_parts = not self._sends_parts
            super().all_to_all(received, self._damage(sent) if self._sends_parts else sent, meanwhile)

        def all_gather(self, received: Any, sent: Any) -> None:
            self._look(self._patience_s)
            super().all_gather(received, sent)

        def _look(self, patience_s: float) -> None:
            limit = time.monotonic() + patience_s
            while cut := [name for name in self._others if links.is_cut(self._island, name)]:
                if self._is_closed or not links.get().get("silent") or time.monotonic() > limit:
                    self.close()
                    raise RuntimeError(f"no way to {', '.join(cut)}")
                time.sleep(0.05)

        def _damage(self, sent: Any) -> Any:
            if links.get().get("damaged", {}).get(self._island, 0) <= _damaged[self._island]:
                return sent
            _damaged[self._island] += 1
            damaged = []
            for head, codes, scales in sent:
                codes = codes.clone()
                codes[-1:] ^= 255
                damaged.append((head, codes, scales))
            return damaged

    def enter_at(self: Any, epoch: Any) -> bool:
        _place.island, _place.members = self.island, sorted(epoch.members)
        return enter(self, epoch)

    def hail_over(self: Any, name: str, address: str) -> bool:
        return not links.is_cut(self._name.decode(), name) and hail(self, name, address)

    replace(exchange, "GlooWire", FaultyWire)
    replace(exchange.Exchange, "_enter", enter_at)
    replace(reach.Reach, "hail", hail_over)


def _install_in_worker() -> None:
    from factory_train.diloco import OuterLoop

    links, island, after_step = Links(Path(os.environ["LINKS"])), os.environ["FACTORY_TRAIN_GANG"], OuterLoop.after_step

    def slowly(self: OuterLoop, step: int) -> int:
        told = links.get()
        start, crawl_s = told.get("crawl") or (step + 1, 0.0)
        time.sleep(crawl_s if step >= start else told.get("pace_s", 0.0))
        return after_step(self, step)

    install(links, setattr)
    setattr(OuterLoop, "after_step", slowly)  # noqa: B010
    while island in links.get().get("absent", ()):
        time.sleep(0.1)


if "LINKS" in os.environ and os.environ.get("FACTORY_TRAIN_GANG", "").startswith("island-"):
    _install_in_worker()
