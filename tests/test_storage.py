"""Files that other processes read while they are written, on disks that fill up."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from factory_train.storage import JsonLinesFile, read_json_lines


def test_rows_are_there_for_readers_at_once_and_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for start in (0, 2):
        file = JsonLinesFile(path)
        for number in (start, start + 1):
            file.append({"number": number})
            assert read_json_lines(path)[-1] == {"number": number}
        file.close()
        file.close()
    assert [row["number"] for row in read_json_lines(path)] == [0, 1, 2, 3]


def test_a_full_disk_tears_no_line_and_what_was_held_back_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, room, really_write = JsonLinesFile(tmp_path / "rows.jsonl"), [30], os.write

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        # As a real disk does: what still fits is written, and the next call fails.
        count = really_write(fd, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)
    for number in range(5):
        file.append({"number": number})
    assert (tmp_path / "rows.jsonl").read_text() == '{"number": 0}\n{"number": 1}\n'
    room[0] = 10**6
    file.append({"number": 5})
    assert [json.loads(line)["number"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
