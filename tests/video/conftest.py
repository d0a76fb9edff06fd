"""The makers of clips as one fixture."""

from __future__ import annotations

import pytest
from made_clips import numbered_picture, read_number, with_payload, write_clip, write_sound


class Clips:
    """The makers above, as one fixture."""

    numbered_picture = staticmethod(numbered_picture)
    read_number = staticmethod(read_number)
    write = staticmethod(write_clip)
    write_sound = staticmethod(write_sound)
    with_payload = staticmethod(with_payload)


@pytest.fixture(scope="session")
def clips() -> type[Clips]:
    return Clips
