"""What a stream of tensors sends, and that the receiver always has what was sent."""

from __future__ import annotations

import random

import pytest
import torch

from raylight.cluster.tensor_delta import Message, Receiver, Sender, _form

CPU = torch.device("cpu")
LIMIT = 2**20


def sent_bytes(message: Message) -> int:
    return sum(update.data.nbytes for update in message.updates if update.data is not None)


def test_what_was_sent_before_is_not_sent_again() -> None:
    sender, receiver = Sender("one", LIMIT), Receiver(CPU)
    value = torch.randn(2, 40, 64)
    for expected_bytes in (value.nbytes, 0):
        sender.slot(value.clone())
        message = sender.message()
        assert sent_bytes(message) == expected_bytes
        assert torch.equal(receiver.receive(message)[0], value)


def test_tensors_of_two_devices_are_not_compared() -> None:
    """PyTorch would raise. A tensor without memory stands for one on a GPU."""
    value = torch.randn(1, 36, 5, 8, 8)
    elsewhere = torch.empty_like(value, device="meta")
    assert _form(value) == _form(value.clone()) != _form(elsewhere)


def test_unchanged_channels_are_not_sent() -> None:
    sender, receiver = Sender("one", LIMIT), Receiver(CPU)
    first = torch.randn(1, 36, 5, 8, 8)
    second = first.clone()
    second[:, :16] += 1
    for value, expected_bytes in ((first, first.nbytes), (second, first[:, :16].nbytes)):
        sender.slot(value)
        message = sender.message()
        assert sent_bytes(message) == expected_bytes
        assert torch.equal(receiver.receive(message)[0], value)


def test_changes_in_place_on_either_side_do_no_harm() -> None:
    sender, receiver = Sender("one", LIMIT), Receiver(CPU)
    value = torch.randn(2, 40, 64)
    sender.slot(value)
    receiver.receive(sender.message())[0].zero_()
    before = value.clone()
    value += 1
    for one in (value, before):
        sender.slot(one)
        assert torch.equal(receiver.receive(sender.message())[0], one)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.arange(3000),
        torch.rand(60, 70) > 0.5,
        torch.randn(50, 60).to(torch.bfloat16),
        torch.randn(80, 90).to(torch.float8_e4m3fn).float(),
        torch.randn(60, 50).t(),
        torch.randn(1, 50).expand(40, 50),
        torch.randn(1).expand(1, 1),
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}",
)
def test_every_shape_and_dtype_arrives_unchanged(value: torch.Tensor) -> None:
    sender, receiver = Sender("one", LIMIT), Receiver(CPU)
    for _ in range(2):
        sender.slot(value)
        actual = receiver.receive(sender.message())[0]
        assert actual.dtype == value.dtype and torch.equal(actual, value)


def test_both_ends_agree_when_memory_is_short() -> None:
    choice, generator = random.Random(1), torch.Generator().manual_seed(1)
    sender, receiver = Sender("one", 40_000), Receiver(CPU)
    pool = [torch.randn(1, 4, 20, 20, generator=generator) for _ in range(12)]
    for _ in range(200):
        values = [choice.choice(pool).clone() for _ in range(choice.randint(1, 4))]
        if choice.random() < 0.5:
            values[0][:, choice.randrange(4)] += 1
        for value in values:
            sender.slot(value)
        for actual, value in zip(receiver.receive(sender.message()), values, strict=True):
            assert torch.equal(actual, value)


def test_another_stream_starts_again() -> None:
    receiver, value = Receiver(CPU), torch.randn(2, 40, 64)
    for stream in ("one", "two"):
        sender = Sender(stream, LIMIT)
        sender.slot(value)
        message = sender.message()
        assert sent_bytes(message) == value.nbytes
        assert torch.equal(receiver.receive(message)[0], value)
