"""One round of an exchange: the weighted mean of what all islands encoded, the same bytes on each.

Each member owns a part of the blocks. All-to-all: every member sends every owner its codes of that part. The owner adds them up
in float32 in the members' order and encodes the sum once. All-gather: it sends that to all, and decodes what it sent, like the
others. An acknowledgement follows: a member applies a result only when all members have the same one.

Every message carries a checksum. What arrives damaged is sent again; a member whose part arrives damaged again and again weighs
nothing in the round.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import xxhash

from factory_train.errors import FactoryTrainError
from factory_train.kernels import pseudogradient as kernels

_HEAD = struct.Struct("<QqqqqdqQ")
HEAD_BYTES = _HEAD.size
# So often is a round sent in all; in the last try the members whose parts were damaged weigh nothing.
TRIES = 3


class RoundFailedError(FactoryTrainError):
    """A round that did not come to an end: a member is gone, late, or at another place."""


class Wire(Protocol):
    """How one rank of an island talks to the same rank of the others; tensors are uint8 on the CPU."""

    rank: int
    size: int

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Sends row m of `sent` to member m; row m of `received` is what member m sent here."""
        ...

    def all_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Makes row m of `received` what member m sent to all."""
        ...

    def room(self, what: str, *shape: int) -> torch.Tensor:
        """Returns memory for `what`, of any content, that this wire keeps from round to round."""
        ...


@dataclass(frozen=True)
class Notice:
    """What a member says with its part of a round.

    Args:
        epoch, number, fragment: which round it is; the same for all members.
        flags: bits, see `exchange`.
        weight: its part of the mean before all are divided by their sum; 0 takes part and counts for nothing.
        fingerprint: of the state after the last round it applied, as a signed 64-bit number.
    """

    epoch: int
    number: int
    fragment: int
    flags: int
    weight: float
    fingerprint: int

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


def shard_blocks(blocks: int, members: int) -> int:
    """Returns the blocks of each member's part; the last part may reach beyond the end."""
    return -(-blocks // members)


def payload_bytes(n: int, members: int, format: str) -> int:
    """Returns what one rank sends in a round, in bytes: 2 (M - 1) parts with their heads, and the acknowledgement."""
    per_block = kernels.CODE_BYTES[format] + 4 * kernels.has_scales(format)
    part = shard_blocks(kernels.num_blocks(n), members) * per_block + HEAD_BYTES
    return (members - 1) * (2 * part + 8)


def reduce_round(wire: Wire, notice: Notice, codes: torch.Tensor, scales: torch.Tensor, format: str, device: torch.device) -> Reduced:
    """Takes part in one round; all members call it.

    Args:
        wire: to the other members.
        notice: what this member says.
        codes, scales: its encoded pseudo-gradient (`kernels.pseudogradient.encode`), on the CPU.
        format: of the codes.
        device: where the reduction is computed.

    Raises:
        RoundFailedError: the members are not at the same round, or too much arrived damaged.
        RuntimeError: a member did not answer in time, or is gone.
    """
    damaged: set[int] = set()
    for attempt in range(1, TRIES + 1):
        left_out = tuple(sorted(damaged)) if attempt == TRIES else ()
        reduced, bad = _try(wire, notice, codes, scales, format, device, left_out)
        if reduced is not None:
            return replace(reduced, tries=attempt)
        damaged |= bad
    raise RoundFailedError(f"round {notice.number} arrived damaged {TRIES} times", where="diloco")


def _try(
    wire: Wire,
    notice: Notice,
    codes: torch.Tensor,
    scales: torch.Tensor,
    format: str,
    device: torch.device,
    left_out: tuple[int, ...],
) -> tuple[Reduced | None, set[int]]:
    blocks = codes.numel() // kernels.CODE_BYTES[format]
    part = shard_blocks(blocks, wire.size)
    sent = _messages(wire, notice, codes, scales, part, format)
    received = wire.room("received", *sent.shape)
    wire.all_to_all(received, sent)
    good = [_is_intact(message) or member in left_out for member, message in enumerate(received)]
    notices = [Notice.decode(_head(message))[0] if ok else None for message, ok in zip(received, good, strict=True)]
    _check_same_round(notice, notices)
    bad = sum(1 << member for member, ok in enumerate(good) if not ok)
    weights = [said.weight if said is not None and member not in left_out else 0.0 for member, said in enumerate(notices)]
    own = _reduce_part(received, weights, part, format, device)
    message = wire.room("own", HEAD_BYTES + own.numel())
    message[HEAD_BYTES:] = own
    _seal(message, notice, bad)
    gathered = wire.room("gathered", wire.size, message.numel())
    wire.all_gather(gathered, message)
    intact = all(map(_is_intact, gathered))
    said = [Notice.decode(_head(row)) for row in gathered]
    # Anybody's damage is everybody's: all members try again, or none.
    digest = _digest(gathered) & 0x7FFFFFFFFFFFFFFF if intact and not any(bits for _, bits in said) else 0
    answers = torch.empty(wire.size, 8, dtype=torch.uint8)
    wire.all_gather(answers, torch.tensor([digest], dtype=torch.int64).view(torch.uint8))
    digests = answers.view(torch.int64).view(-1).tolist()
    if digest == 0 or len(set(digests)) != 1:
        reported = [bits for _, bits in said] if intact else [bad]
        return None, {member for member in range(wire.size) if any(bits >> member & 1 for bits in reported)}
    everybody = tuple(item for item, _ in said)
    if not any(item.weight for member, item in enumerate(everybody) if member not in left_out):
        return Reduced(None, None, everybody, left_out), set()
    size = part * kernels.CODE_BYTES[format]
    all_codes = gathered[:, HEAD_BYTES : HEAD_BYTES + size].reshape(-1)[: codes.numel()]
    all_scales = gathered[:, HEAD_BYTES + size :].contiguous().view(torch.float32).reshape(-1)[: scales.numel()]
    return Reduced(all_codes, all_scales, everybody, left_out), set()


def _messages(wire: Wire, notice: Notice, codes: torch.Tensor, scales: torch.Tensor, part: int, format: str) -> torch.Tensor:
    """Returns one message a row: head, codes and scales of that member's part; what lies beyond the end is zeros."""
    code_bytes = part * kernels.CODE_BYTES[format]
    scale_bytes = 4 * part * kernels.has_scales(format)
    messages = wire.room("sent", wire.size, HEAD_BYTES + code_bytes + scale_bytes)
    for (start, length), source in (((HEAD_BYTES, code_bytes), codes), ((HEAD_BYTES + code_bytes, scale_bytes), scales.view(torch.uint8))):
        for member in range(wire.size if length else 0):
            piece = source[member * length : (member + 1) * length]
            messages[member, start : start + len(piece)] = piece
            messages[member, start + len(piece) : start + length] = 0
    for message in messages:
        _seal(message, notice, 0)
    return messages


def _reduce_part(received: torch.Tensor, weights: Sequence[float], part: int, format: str, device: torch.device) -> torch.Tensor:
    """Returns codes and scales of the weighted mean of one part, one after the other, on the CPU."""
    size, total = part * kernels.CODE_BYTES[format], sum(weights)
    codes = received[:, HEAD_BYTES : HEAD_BYTES + size].contiguous().to(device)
    scales = received[:, HEAD_BYTES + size :].contiguous().view(torch.float32).to(device)
    shares = [weight / total if total else 0.0 for weight in weights]
    wide = torch.float64 if format == "fp64" else torch.float32
    out_codes, out_scales = torch.empty_like(codes[0]), torch.empty_like(scales[0])
    kernels.reduce(codes, scales, torch.tensor(shares, dtype=wide, device=device), out_codes, out_scales, format)
    return torch.cat((out_codes, out_scales.view(torch.uint8))).cpu()


def _seal(message: torch.Tensor, notice: Notice, bad: int) -> None:
    message[:HEAD_BYTES] = torch.frombuffer(bytearray(notice.encode(0, bad)), dtype=torch.uint8)
    digest = _digest(message[8:])
    message[:8] = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.uint8)


def _digest(data: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _head(message: torch.Tensor) -> bytes:
    return message[:HEAD_BYTES].numpy().tobytes()


def _is_intact(message: torch.Tensor) -> bool:
    (digest,) = struct.unpack("<Q", message[:8].numpy().tobytes())
    return _digest(message[8:]) == digest


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
