"""Previews that a GPU copies while the host goes on."""

from __future__ import annotations

import time

import torch

from raylight.worker.step_reports import for_preview

CYCLES = 100_000_000  # of the GPU, which takes 50 ms or more for them
SHORT_S = 0.02


def test_a_preview_is_there_when_its_step_is_done_and_the_host_does_not_wait() -> None:
    device = torch.device("cuda", 0)
    for shape in ((2, 16, 3, 40, 24), (2, 16, 40, 24)):
        for dtype in (torch.float32, torch.bfloat16):
            x0 = torch.randn(shape, device=device).to(dtype)
            first = (x0[:1, :, :1] if x0.ndim == 5 else x0[:1]).float().cpu()
            for turn in range(3):  # the first loads kernels and takes pinned memory, for which the host waits
                expected = first * 2 ** (turn + 1)
                before = x0.clone()
                torch.cuda.synchronize()
                began = time.perf_counter()
                torch.cuda._sleep(CYCLES)
                x0 *= 2
                preview = for_preview(x0)
                done = torch.cuda.Event()
                done.record()
                x0.zero_()  # the copy is of before
                assert turn == 0 or time.perf_counter() - began < SHORT_S
                done.synchronize()
                assert torch.equal(preview, expected)
                assert preview.device.type == "cpu" and preview.dtype == torch.float32
                x0.copy_(before * 2)
