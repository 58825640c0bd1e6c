"""An averager whose newcomers load a model and its optimizer, and not only the tensors that are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from potluck._state import StateCodec, count_of
from potluck.averaging.averager import DecentralizedAverager
from potluck.compression import CompressionInfo
from potluck.compression.adaptive import check_names


class CodecAverager(DecentralizedAverager):
    """Offers and loads what a :class:`StateCodec` captures, with plain facts beside it."""

    _codec: StateCodec
    # The codec has names of its own.
    _named_alike = ("compression",)

    def _check_names(self) -> None:
        super()._check_names()
        count = len(self._codec.parameters)
        keys = [f"param.{i:06}" for i in range(count)]
        keys += [f"extra.{i:06}" for i in range(len(self._codec.extra_tensors))]
        # Which statistics there are shows with the first step.
        indices = "|".join(f"{i:06}" for i in range(count))
        check_names("state_compression", self.state_compression, keys, rf"\w+\.({indices})")

    def _facts(self) -> dict[str, Any]:
        """What is told beside the state."""
        raise NotImplementedError

    # Under which name the sender's count of epochs or steps comes with the state.
    _count_name: str

    def _loaded(self, count: int) -> None:
        """The state was replaced by another peer's, which has counted so far."""
        raise NotImplementedError

    def get_current_state(self) -> tuple[Any, Sequence[torch.Tensor], Sequence[CompressionInfo]]:
        with self.get_tensors():
            meta, blobs = self._codec.capture()
            copies = [t.clone() for t in blobs.values()]
        infos = [CompressionInfo.from_tensor(t, key=name) for name, t in zip(blobs, copies, strict=True)]
        return {**meta, **self._facts(), "names": list(blobs)}, copies, infos

    def _share(self, session: Any, average: Any = None) -> None:
        if session.epoch == 0:
            return
        if not self._allow_state_sharing:
            session.publish({}, {})
            return
        facts, tensors, _ = self.get_current_state()
        names = facts.pop("names")
        meta = {name: str(value) for name, value in facts.items()}
        session.publish(meta, dict(zip(names, (t.contiguous() for t in tensors), strict=True)))

    def load_state_from_peers(self, wait: bool = True, timeout: float | None = None) -> Any:
        """Replace the model and its optimizer by the newest that others offer; None if there is none that fits."""
        if not wait:
            return super().load_state_from_peers(wait=False, timeout=timeout)
        if self.session.step(0) != "load_state":
            return None
        loaded = self.session.load_state(timeout)
        if loaded is None:
            return None
        if not loaded[1]:
            # Others share no state: only their history is taken over.
            self.session.accept_state()
            return None
        _, meta, blobs = loaded
        try:
            count = count_of(meta, self._count_name)
            with self.get_tensors():
                self._codec.restore(meta, blobs)
                self._loaded(count)
        except ValueError as error:
            return self._refuse(error)
        self.session.accept_state()
        return meta, self._tensors
