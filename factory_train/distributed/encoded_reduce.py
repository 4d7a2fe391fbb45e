"""One round of an exchange: the weighted mean of what all islands encoded, the same bytes on each.

Each member owns a part of the blocks. All-to-all: every member sends every owner its codes of that part. The owner adds them up
in float32 in the members' order and encodes the sum once. All-gather: it sends that to all, and decodes what it sent, like the
others. An acknowledgement follows: a member applies a result only when all members have the same one.

Every message carries a checksum. What arrives damaged is sent again; a member whose part arrives damaged again and again weighs
nothing in the round.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import xxhash

from factory_train.errors import FactoryTrainError
from factory_train.kernels import pseudogradient as kernels
from factory_train.kernels import pseudogradient_reference as reference

_HEAD = struct.Struct("<QqqqqdqQ")
HEAD_BYTES = _HEAD.size
# So often is a round sent in all; in the last try the members whose parts were damaged weigh nothing.
TRIES = 3
# Blocks that a card reduces at a time.
_BLOCKS_AT_ONCE = 65536

Coded = tuple[torch.Tensor, torch.Tensor]
Message = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class RoundFailedError(FactoryTrainError):
    """A round that did not come to an end: a member is gone, late, or at another place."""


class Wire(Protocol):
    """How one rank of an island talks to the same rank of the others; tensors are on the CPU."""

    rank: int
    size: int

    def all_to_all(
        self,
        received: Sequence[Sequence[torch.Tensor]],
        sent: Sequence[Sequence[torch.Tensor]],
        meanwhile: Callable[[], object] = ...,
    ) -> None:
        """Sends the tensors of entry m of `sent` to member m, and fills those of entry m of `received` with what it sends.

        The entry of this member itself is not looked at, and both sides leave out tensors without elements. `meanwhile` is called
        while they are on their way, unless there is only this member.
        """
        ...

    def all_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Makes row m of `received` what member m sent to all; a few bytes."""
        ...

    def room(self, what: str, size: int) -> torch.Tensor:
        """Returns `size` bytes for `what`, of any content, that this wire keeps from round to round."""
        ...


@dataclass(frozen=True)
class Notice:
    """What a member says with its part of a round.

    Args:
        epoch, number, fragment: which round it is; the same for all members.
        flags: bits, see `exchange`.
        weight: its part of the mean before all are divided by their sum; 0 takes part and counts for nothing.
        fingerprint: of the state after the last round it applied, as a signed 64-bit number; 0 until it is taken.
    """

    epoch: int
    number: int
    fragment: int
    flags: int
    weight: float
    fingerprint: int = 0

    def encode(self, digest: int, bad: int = 0) -> bytes:
        return _HEAD.pack(digest, self.epoch, self.number, self.fragment, self.flags, self.weight, self.fingerprint, bad)

    @staticmethod
    def decode(head: bytes) -> tuple[Notice, int]:
        """Returns the notice and the bits of the members whose parts arrived damaged."""
        _, epoch, number, fragment, flags, weight, fingerprint, bad = _HEAD.unpack(head)
        return Notice(epoch, number, fragment, flags, weight, fingerprint), bad


@dataclass(frozen=True)
class Reduced:
    """The result of a round.

    Args:
        codes, scales: the encoded weighted mean of all blocks; None when no member weighed anything.
        notices: of all members, in their order.
        left_out: places of members that weighed nothing because their parts arrived damaged.
        tries: how often the round was sent.
    """

    codes: torch.Tensor | None
    scales: torch.Tensor | None
    notices: tuple[Notice, ...]
    left_out: tuple[int, ...] = ()
    tries: int = 1


def shard_blocks(blocks: int, members: int, member: int) -> range:
    """Returns the blocks that a member owns; the last ones may own fewer than the others, or none."""
    part = -(-blocks // members)
    return range(min(member * part, blocks), min((member + 1) * part, blocks))


def payload_bytes(n: int, members: int, member: int, format: str) -> int:
    """Returns what a member sends in a round, in bytes: the others' parts, its own M - 1 times, their heads, the acknowledgement."""
    blocks = kernels.num_blocks(n)
    own = len(shard_blocks(blocks, members, member))
    per_block = kernels.CODE_BYTES[format] + 4 * kernels.has_scales(format)
    return (blocks - own + (members - 1) * own) * per_block + (members - 1) * (2 * HEAD_BYTES + 8)


def reduce_round(
    wire: Wire,
    notice: Notice,
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    device: torch.device,
    fingerprint: Callable[[], int],
) -> Reduced:
    """Takes part in one round; all members call it.

    Args:
        wire: to the other members.
        notice: what this member says, but for the fingerprint.
        codes, scales: its encoded pseudo-gradient (`kernels.pseudogradient.encode`), on the CPU.
        format: of the codes.
        device: where the reduction is computed.
        fingerprint: takes that of this member's state; called once, while codes are on their way.

    Raises:
        RoundFailedError: the members are not at the same round, or too much arrived damaged.
        RuntimeError: a member did not answer in time, or is gone.
    """
    damaged: set[int] = set()
    fingerprint = functools.cache(fingerprint)
    for attempt in range(1, TRIES + 1):
        left_out = tuple(sorted(damaged)) if attempt == TRIES else ()
        reduced, bad = _try(wire, notice, (codes, scales), format, device, fingerprint, left_out)
        if reduced is not None:
            return replace(reduced, tries=attempt)
        damaged |= bad
    raise RoundFailedError(f"round {notice.number} arrived damaged {TRIES} times", where="diloco")


def _try(
    wire: Wire,
    notice: Notice,
    mine: Coded,
    format: str,
    device: torch.device,
    fingerprint: Callable[[], int],
    left_out: tuple[int, ...],
) -> tuple[Reduced | None, set[int]]:
    blocks, members = mine[0].numel() // kernels.CODE_BYTES[format], range(wire.size)
    others = [member for member in members if member != wire.rank]
    parts = [shard_blocks(blocks, wire.size, member) for member in members]
    # What a member keeps for itself needs no hash.
    sent = [_message(notice, 0, *_of_blocks(*mine, part, format), hashed=member in others) for member, part in enumerate(parts)]
    received = [sent[wire.rank] if member == wire.rank else _space(wire, member, parts[wire.rank], format) for member in members]
    wire.all_to_all(received, sent, fingerprint)
    bad = sum(1 << member for member in others if not _is_intact(received[member]) and member not in left_out)
    heads = [_read(message) if not bad >> member & 1 and member not in left_out else None for member, message in enumerate(received)]
    notices = [None if head is None else head[0] for head in heads]
    _check_same_round(notice, notices)
    weights = [0.0 if said is None else said.weight for said in notices]
    # What the last round came to is kept until this one is over: others may still need it.
    result = _result(wire, f"result {notice.number % 2}", blocks, format)
    own = _of_blocks(*result, parts[wire.rank], format)
    _reduce_part([(codes, scales) for _, codes, scales in received], weights, own, format, device)
    message = _message(replace(notice, fingerprint=fingerprint()), bad, *own)
    gathered = [(_new_head(), *_of_blocks(*result, part, format)) for part in parts]
    gathered[wire.rank] = message
    wire.all_to_all(gathered, [message] * wire.size)
    intact = all(_is_intact(gathered[member]) for member in others)
    said = [_read(message) for message in gathered]
    # Anybody's damage is everybody's: all members try again, or none. Heads hold the hashes of all that came with them.
    good = intact and not any(bits for _, bits in said)
    digest = _digest([head for head, *_ in gathered]) & 0x7FFFFFFFFFFFFFFF if good else 0
    answers = torch.empty(wire.size, 8, dtype=torch.uint8)
    wire.all_gather(answers, torch.tensor([digest], dtype=torch.int64).view(torch.uint8))
    digests = answers.view(torch.int64).view(-1).tolist()
    if digest == 0 or len(set(digests)) != 1:
        reported = [bits for _, bits in said] if intact else [bad]
        return None, {member for member in members if any(bits >> member & 1 for bits in reported)}
    everybody = tuple(item for item, _ in said)
    if not any(item.weight for member, item in enumerate(everybody) if member not in left_out):
        return Reduced(None, None, everybody, left_out), set()
    return Reduced(*result, everybody, left_out), set()


def _of_blocks(codes: torch.Tensor, scales: torch.Tensor, blocks: range, format: str) -> Coded:
    """Returns the codes and scales of some of the blocks."""
    size = kernels.CODE_BYTES[format]
    return codes[blocks.start * size : blocks.stop * size], scales[blocks.start : blocks.stop] if scales.numel() else scales


def _result(wire: Wire, what: str, blocks: int, format: str) -> Coded:
    """Returns room for codes and scales."""
    codes = wire.room(f"codes {what}", blocks * kernels.CODE_BYTES[format])
    return codes, wire.room(f"scales {what}", 4 * blocks * kernels.has_scales(format)).view(torch.float32)


def _space(wire: Wire, member: int, blocks: range, format: str) -> Message:
    return _new_head(), *_result(wire, f"of member {member}", len(blocks), format)


def _reduce_part(sent: Sequence[Coded], weights: Sequence[float], own: Coded, format: str, device: torch.device) -> None:
    """Fills codes and scales with the weighted mean of what members sent for the same blocks: on a card, some of them at a time."""
    total = sum(weights)
    wide = torch.float64 if format == "fp64" else torch.float32
    shares = torch.tensor([weight / total if total else 0.0 for weight in weights], dtype=wide, device=device)
    if device.type == "cpu":
        # From where they arrived.
        reference.reduce([codes for codes, _ in sent], [scales for _, scales in sent], shares, *own, format)
        return
    blocks = own[0].numel() // kernels.CODE_BYTES[format]
    for first in range(0, blocks, _BLOCKS_AT_ONCE):
        some = range(first, min(first + _BLOCKS_AT_ONCE, blocks))
        pieces = [[tensor.to(device, non_blocking=True) for tensor in _of_blocks(*coded, some, format)] for coded in sent]
        codes, scales = (torch.stack(tensors) for tensors in zip(*pieces, strict=True))
        mine = _of_blocks(*own, some, format)
        out = [torch.empty_like(tensor, device=device) for tensor in mine]
        kernels.reduce(codes, scales, shares, *out, format)
        for host, tensor in zip(mine, out, strict=True):
            host.copy_(tensor)


def _new_head() -> torch.Tensor:
    return torch.empty(HEAD_BYTES, dtype=torch.uint8)


def _message(notice: Notice, bad: int, codes: torch.Tensor, scales: torch.Tensor, *, hashed: bool = True) -> Message:
    """Returns a message whose head begins with the hash of all that follows."""
    head = torch.frombuffer(bytearray(notice.encode(0, bad)), dtype=torch.uint8)
    if hashed:
        head[:8] = torch.frombuffer(bytearray(struct.pack("<Q", _digest((head[8:], codes, scales)))), dtype=torch.uint8)
    return head, codes, scales


def _digest(parts: Sequence[torch.Tensor]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.numpy().data)
    return digest.intdigest()


def _read(message: Message) -> tuple[Notice, int]:
    return Notice.decode(message[0].numpy().tobytes())


def _is_intact(message: Message) -> bool:
    head, codes, scales = message
    (digest,) = struct.unpack("<Q", head[:8].numpy().tobytes())
    return _digest((head[8:], codes, scales)) == digest


def _check_same_round(mine: Notice, notices: Sequence[Notice | None]) -> None:
    def place(notice: Notice) -> tuple[int, int, int]:
        return notice.epoch, notice.number, notice.fragment

    for member, other in enumerate(notices):
        if other is not None and place(other) != place(mine):
            raise RoundFailedError(
                f"epoch, round and fragment {place(mine)} meet {place(other)} of member {member}",
                where="diloco",
                fix="start all islands with the same diloco.*, train.steps and model.*",
            )
