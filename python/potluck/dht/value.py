"""What a record may hold."""

from __future__ import annotations

from typing import Any

DHTValue = Any  # whatever msgpack can express
