"""What islands tell each other, through a folder and over TCP: one contract, and what only a server has to bear."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from served_board import free_port, served

from factory_train.distributed.board import Beat, Board, Epoch, FolderBoard, Lease
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.tcp_board import TcpBoard, open_board
from factory_train.errors import ConfigError, FactoryTrainError, PolicyError
from factory_train.rendezvous import client, server, wire
from factory_train.rendezvous.address import TOKEN_VARIABLE, Address, keep_token, read_token, token_path
from factory_train.rendezvous.client import AwayError
from factory_train.rendezvous.records import FolderRecords
from factory_train.rendezvous.server import RecordsServer
from factory_train.rendezvous.wire import Channel, Introduction

EPOCH = Epoch(1, 1, {"a": 1, "b": 1}, joining=("b",), deal={"steps": 4, "shares": {"a": {"begins": 0, "held": [1]}}}, why="begins")
Open = Callable[[], Board]


@pytest.fixture(params=["folder", "tcp"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same board again and again, as each process does."""
    if request.param == "folder":
        yield lambda: open_board(tmp_path / "exchange", None)
        return
    with served(tmp_path / "exchange", free_port()) as rendezvous:
        yield lambda: open_board(tmp_path / "exchange", rendezvous)


def test_epochs_and_leases_are_written_once(opened: Open) -> None:
    board, other = opened(), opened()
    assert board.epoch() is None
    assert board.lease() is None
    assert board.publish(EPOCH)
    assert not other.publish(replace(EPOCH, members={"b": 1}))
    assert other.epoch() == EPOCH
    assert board.take_lease(Lease(1, "a", 1))
    assert not other.take_lease(Lease(1, "b", 1))
    assert other.take_lease(Lease(2, "b", 1))
    assert board.lease() == Lease(2, "b", 1)


def test_the_newest_epoch_is_that_with_the_highest_number(opened: Open) -> None:
    board = opened()
    for number in (1, 2, 10, 9):
        assert board.publish(replace(EPOCH, number=number))
    assert opened().epoch() == replace(EPOCH, number=10)


def test_a_sign_of_life_replaces_the_last_one(opened: Open) -> None:
    board, other = opened(), opened()
    assert other.beats() == {}
    board.write_beat(Beat("a", 3, 7, resumes=(4, 8)))
    board.write_beat(Beat("a", 3, 8, resumes=(4, 8)))
    other.write_beat(Beat("b", 1))
    assert other.beats() == {"a": Beat("a", 3, 8, resumes=(4, 8)), "b": Beat("b", 1)}


# Without torch, which takes seconds to import.
WRITER = """
import sys
from pathlib import Path
from factory_train.rendezvous.address import Address, identity, read_token
from factory_train.rendezvous.client import TcpRecords
from factory_train.rendezvous.records import FolderRecords
from factory_train.rendezvous.wire import Introduction
folder, rendezvous, me = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
records = FolderRecords(folder)
if rendezvous:
    records = TcpRecords(Address.parse(rendezvous), read_token(folder), Introduction(identity(folder), me))
print("ready", flush=True)
sys.stdin.readline()
taken = []
for number in range(1, 41):
    records.replace("beats", me, {"count": number})
    if records.create("leases", number, {"island": me}):
        taken.append(number)
print(taken)
"""


@pytest.mark.parametrize("kind", ["folder", "tcp"])
def test_of_processes_that_write_at_once_exactly_one_wins(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "exchange"
    with served(folder, free_port()) as address:
        rendezvous = address if kind == "tcp" else ""
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        writers = {
            name: subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), rendezvous, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environ,
            )
            for name in ("a", "b", "c")
        }
        try:
            assert [writer.stdout.readline() for writer in writers.values()] == ["ready\n"] * 3
            for writer in writers.values():
                writer.stdin.write("go\n")
                writer.stdin.flush()
            taken = {name: json.loads(writer.communicate(timeout=60)[0]) for name, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.kill()
        assert sorted(number for numbers in taken.values() for number in numbers) == list(range(1, 41))
        records = FolderRecords(folder)
        assert records.newest("leases") == {"island": next(name for name, numbers in taken.items() if 40 in numbers)}
        assert records.all("beats") == {name: {"count": 40} for name in "abc"}


def test_ranks_meet_at_the_board_and_talk(opened: Open) -> None:
    grace, sums = datetime.timedelta(seconds=20), {}

    def meet(island: str) -> None:
        board = opened()
        link = GlooWire(board.store(EPOCH, 0, grace), EPOCH.place(island), 2, grace)
        received = torch.empty(2, 1, dtype=torch.uint8)
        link.all_gather(received, torch.tensor([ord(island)], dtype=torch.uint8))
        sums[island] = received.view(-1).tolist()
        link.close()
        board.close()

    threads = [threading.Thread(target=meet, args=(island,), daemon=True) for island in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sums == {"a": [97, 98], "b": [97, 98]}


def test_who_is_not_met_in_time_has_failed(opened: Open) -> None:
    grace = datetime.timedelta(seconds=0.3)
    with pytest.raises(RuntimeError):
        GlooWire(opened().store(EPOCH, 0, grace), 0, 2, grace)


# A server that goes and comes back


def test_a_server_that_starts_again_goes_on_with_the_same_epochs(tmp_path: Path) -> None:
    folder, port = tmp_path / "exchange", free_port()
    with served(folder, port) as rendezvous:
        board = open_board(folder, rendezvous)
        assert board.publish(EPOCH)
        assert board.take_lease(Lease(1, "a", 1))
    with pytest.raises(AwayError, match=f"nothing listens at tcp://127.0.0.1:{port}"):
        until_it_fails(board)
    with served(folder, port):
        assert eventually(board.epoch) == EPOCH
        assert not board.publish(replace(EPOCH, why="another"))
        assert board.lease() == Lease(1, "a", 1)


def until_it_fails(board: Board) -> None:
    """A request that was under way when the server went may still have been answered."""
    for _ in range(2):
        board.epoch()


def eventually(ask: Callable[[], object], timeout_s: float = 20.0) -> object:
    """Asks until the server is there."""
    limit = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except AwayError:
            assert time.monotonic() < limit, "the server was not found again"
            time.sleep(0.02)


def test_a_write_whose_answer_was_lost_counts_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []
    answer = RecordsServer._answer

    def lose(self: RecordsServer, asked: dict, them: Introduction) -> dict:
        found = answer(self, asked, them)
        if asked["do"] == "create" and not lost:
            lost.append(asked)
            raise ConnectionResetError
        return found

    monkeypatch.setattr(RecordsServer, "_answer", lose)
    with served(tmp_path, free_port()) as rendezvous:
        board = open_board(tmp_path, rendezvous)
        assert board.lease() is None
        assert board.take_lease(Lease(1, "a", 1))
        assert lost
        assert not board.take_lease(Lease(1, "b", 1))


def test_records_of_another_run_in_the_same_place_are_noticed(tmp_path: Path) -> None:
    port = free_port()
    with served(tmp_path / "first", port) as rendezvous:
        board = open_board(tmp_path / "first", rendezvous)
        assert board.epoch() is None
    (tmp_path / "second").mkdir()
    token_path(tmp_path / "second").write_bytes(read_token(tmp_path / "first"))
    token_path(tmp_path / "second").chmod(0o600)
    with served(tmp_path / "second", port), pytest.raises(FactoryTrainError, match="from another run directory now"):
        eventually(board.epoch)


# Two runs that meet


def join_from(folder: Path, host: Path, rendezvous: str) -> TcpBoard:
    """Opens a board from another run's directory, which was given the token."""
    keep_token(folder, {TOKEN_VARIABLE: read_token(host).decode()})
    board = open_board(folder, rendezvous)
    assert isinstance(board, TcpBoard)
    return board


def test_what_another_runs_directory_serves_is_kept_in_ones_own_for_status(tmp_path: Path) -> None:
    with served(tmp_path / "host", free_port()) as rendezvous:
        host, guest = open_board(tmp_path / "host", rendezvous), join_from(tmp_path / "guest", tmp_path / "host", rendezvous)
        host.publish(EPOCH)
        host.write_beat(Beat("a", 1))
        guest.write_beat(Beat("b", 1, 5))
        assert guest.epoch() == EPOCH
    own = FolderBoard(tmp_path / "guest")
    assert own.epoch() == EPOCH
    assert own.beats() == {"b": Beat("b", 1, 5)}


def test_two_runs_cannot_be_the_same_island(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(2):
        # Also after the server has started again.
        with served(tmp_path / "host", port) as rendezvous:
            open_board(tmp_path / "host", rendezvous).write_beat(Beat("island-0", 1))
            guest = join_from(tmp_path / "guest", tmp_path / "host", rendezvous)
            guest.write_beat(Beat("island-1", 1))
            with pytest.raises(ConfigError, match="island-0 is an island of another run already") as caught:
                guest.write_beat(Beat("island-0", 1))
            assert "diloco.local_islands" in str(caught.value)
    with served(tmp_path / "host", port):
        (tmp_path / "host" / "writers" / "island-0.json").unlink()
        eventually(lambda: guest.write_beat(Beat("island-0", 1)))


# Strangers


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[str]:
    """A server that has to do with strangers; at the end it still works for its own."""
    with served(tmp_path / "exchange", free_port()) as rendezvous:
        yield rendezvous
        assert open_board(tmp_path / "exchange", rendezvous).publish(EPOCH)


def call(rendezvous: str) -> socket.socket:
    address = Address.parse(rendezvous)
    return socket.create_connection((address.host, address.port), 20)


def is_closed(connection: socket.socket) -> bool:
    """Reads to the end."""
    connection.settimeout(20)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_another_token_is_refused(strangers: str, tmp_path: Path) -> None:
    keep_token(tmp_path / "other", {})
    board = open_board(tmp_path / "other", strangers)
    with pytest.raises(ConfigError, match="knows another token") as caught:
        board.epoch()
    assert TOKEN_VARIABLE in str(caught.value)


def test_the_token_is_never_sent(tmp_path: Path) -> None:
    """A listener in between sees nothing that would let it in later: each handshake has its own proof."""
    proofs = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(2):
            thread = threading.Thread(target=wire.welcome, args=(Channel(theirs), b"secret", Introduction("s", "there"), 20.0))
            thread.start()
            real = Channel(ours)
            sent = []
            keep = real.send
            real.send = lambda value, timeout_s, sent=sent, keep=keep: (sent.append(value), keep(value, timeout_s))  # type: ignore[method-assign]
            assert wire.introduce(real, b"secret", Introduction("c", "here"), 20.0) == Introduction("s", "there")
            thread.join()
            assert "secret" not in json.dumps(sent)
            proofs.append(sent[0]["proof"])
    assert proofs[0] != proofs[1]


def test_a_server_that_does_not_know_the_token_is_not_believed(tmp_path: Path) -> None:
    """It may let everybody in; an island does not take its epochs."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fake = Channel(theirs)
        fake.send({"speaks": wire.SPEAKS, "version": wire.VERSION, "nonce": "00"}, 20.0)
        fake.send({"id": "s", "where": "there", "proof": "00"}, 20.0)
        with pytest.raises(wire.WrongTokenError):
            wire.introduce(Channel(ours), b"secret", Introduction("c", "here"), 20.0)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(64),
        struct.pack(">I", wire.HELLO_BYTES + 1),
        struct.pack(">I", 2**32 - 1) + b"{" * 5000,
        struct.pack(">I", 4000) + b"[" * 4000,
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 14) + b'{"version": 1}',
    ],
    ids=["http", "garbage", "too long", "far too long", "deep", "no fields", "empty", "no proof"],
)
def test_a_stranger_is_hung_up_on(strangers: str, data: bytes) -> None:
    with call(strangers) as connection:
        connection.sendall(data)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)


def test_who_says_nothing_or_little_does_not_stay(strangers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PATIENCE_S", 0.2)
    with call(strangers) as silent, call(strangers) as slow:
        slow.sendall(b"\0\0")
        assert is_closed(silent)
        assert is_closed(slow)


def test_too_many_strangers_at_once_are_not_let_in(strangers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MOST_STRANGERS", 3)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(call(strangers)) for _ in range(3)]
        greetings = [Channel(connection).receive(20.0) for connection in crowd]
        assert all(greeting["speaks"] == wire.SPEAKS for greeting in greetings)
        with call(strangers) as one_more:
            assert one_more.recv(1) == b""
    # Their places are free again when they are gone.
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        with call(strangers) as late:
            if late.recv(1):
                return
    raise AssertionError("nobody is let in any more")


@pytest.mark.parametrize(
    "asked",
    [
        {"do": "replace", "kind": "beats", "name": "../../token", "value": 1},
        {"do": "replace", "kind": "../beats", "name": "a", "value": 1},
        {"do": "create", "kind": "epochs", "number": -1, "value": 1},
        {"do": "create", "kind": "epochs", "number": "1", "value": 1},
        {"do": "all", "kind": "writers"},
        {"do": "read", "place": "p", "keys": 3},
        {"do": "run"},
        {},
    ],
)
def test_even_islands_may_ask_for_records_alone(strangers: str, tmp_path: Path, asked: dict) -> None:
    token = read_token(tmp_path / "exchange")
    before = sorted(path for path in (tmp_path / "exchange").rglob("*") if path.is_file())
    with call(strangers) as connection:
        channel = Channel(connection)
        wire.introduce(channel, token, Introduction("c", "here"), 20.0)
        channel.send(asked, 20.0)
        assert is_closed(connection)
    assert sorted(path for path in (tmp_path / "exchange").rglob("*") if path.is_file()) == before


def test_a_message_that_is_too_long_is_not_sent(strangers: str, tmp_path: Path) -> None:
    board = open_board(tmp_path / "exchange", strangers)
    with pytest.raises(ValueError, match="bytes"):
        board.publish(replace(EPOCH, number=7, why="x" * wire.MAX_BYTES))
    assert board.epoch() is None


# What listens there is something else


def answering(port: int, first: bytes) -> socket.socket:
    """A program that greets everybody with `first`."""
    listening = socket.create_server(("127.0.0.1", port))

    def greet() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connection.sendall(first)
                kept.append(connection)

    kept: list[socket.socket] = []
    threading.Thread(target=greet, daemon=True).start()
    return listening


def framed(value: object) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(
    ("greeting", "error", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", ConfigError, "is another program"),
        (framed({"speaks": "something"}), ConfigError, "is another program"),
        (framed({"speaks": wire.SPEAKS, "version": 99, "nonce": "0"}), ConfigError, "speaks version 99 of the protocol, this is 1"),
        (b"", AwayError, "says nothing"),
    ],
)
def test_another_program_at_the_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greeting: bytes, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(client, "_PATIENCE_S", 0.5)
    port = free_port()
    keep_token(tmp_path, {})
    with answering(port, greeting), pytest.raises(error, match=words):
        open_board(tmp_path, f"tcp://127.0.0.1:{port}").epoch()


def test_a_name_nobody_knows_is_named(tmp_path: Path) -> None:
    keep_token(tmp_path, {})
    with pytest.raises(AwayError, match="not known here"):
        open_board(tmp_path, "tcp://no-such-host.invalid:4000").epoch()


# Address and token


@pytest.mark.parametrize(
    "text", ["host:4000", "http://host:4000", "tcp://host", "tcp://:4000", "tcp://h:99999", "tcp://h:1/path", "tcp://0.0.0.0:1"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"diloco\.rendezvous"):
        Address.parse(text)


def test_addresses_of_both_kinds() -> None:
    assert Address.parse("tcp://node-3.cluster:4000") == Address("node-3.cluster", 4000)
    assert str(Address.parse("tcp://[::1]:4000")) == "tcp://[::1]:4000"


def test_a_run_keeps_its_token_and_nobody_else_reads_it(tmp_path: Path) -> None:
    keep_token(tmp_path / "a", {})
    token = read_token(tmp_path / "a")
    assert len(token) == 64
    assert token_path(tmp_path / "a").stat().st_mode & 0o777 == 0o600
    keep_token(tmp_path / "a", {})
    assert read_token(tmp_path / "a") == token
    keep_token(tmp_path / "a", {TOKEN_VARIABLE: "f" * 32})
    assert read_token(tmp_path / "a") == b"f" * 32
    token_path(tmp_path / "a").chmod(0o640)
    with pytest.raises(PolicyError, match="chmod 600"):
        read_token(tmp_path / "a")
    with pytest.raises(ConfigError, match="too short"):
        keep_token(tmp_path / "a", {TOKEN_VARIABLE: "short"})
    with pytest.raises(ConfigError, match="no token"):
        read_token(tmp_path / "b")
