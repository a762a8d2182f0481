"""A picture in memory that several processes write to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from raylight.host.settings import PACK_ROOT
from raylight.host.shared_picture import PictureFile, new_picture, open_picture, resize_picture

SHAPE = (2, 3, 5, 4)
WRITER = """
import sys
import torch
from raylight.host.shared_picture import open_picture, resize_picture
resize_picture(sys.argv[1], (2, 3, 5, 4), torch.float32)
open_picture(sys.argv[1], (2, 3, 5, 4), torch.float32).narrow(-2, 0, 2).fill_(1)
"""


def test_rows_of_several_processes() -> None:
    file = PictureFile()
    subprocess.run(
        [sys.executable, "-c", WRITER, file.path], check=True, env=os.environ | {"PYTHONPATH": str(PACK_ROOT)}
    )
    open_picture(file.path, SHAPE, torch.float32).narrow(-2, 2, 3).fill_(2)
    picture = file.picture(SHAPE, torch.float32)
    path = file.path
    file.close()
    assert not os.path.exists(path)
    assert picture[..., :2, :].eq(1).all() and picture[..., 2:, :].eq(2).all()
    picture.add_(1)
    assert picture.sum() == 2 * 3 * 4 * (2 * 2 + 3 * 3)


def test_a_file_without_a_picture_takes_no_memory() -> None:
    file = PictureFile()
    resize_picture(file.path, (1 << 20, 1 << 10, 1), torch.float32)
    assert os.stat(file.path).st_blocks == 0


def test_an_empty_picture() -> None:
    file = PictureFile()
    resize_picture(file.path, (0, 3, 5, 4), torch.float16)
    assert file.picture((0, 3, 5, 4), torch.float16).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("lacks", ["local workers", "memfd_create", "permission"])
def test_there_is_none_where_workers_cannot_map_it(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError("a container's rules")

    if lacks == "memfd_create":
        monkeypatch.delattr(os, "memfd_create")
    if lacks == "permission":
        monkeypatch.setattr(os, "memfd_create", refused)
    assert new_picture(is_local=lacks != "local workers") is None
