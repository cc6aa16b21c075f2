# SPDX-License-Identifier: Apache-2.0
"""`IgnoreDiscard`: the node option ``discard=ignore``."""

from fleece.block.node import Filter, Node


class IgnoreDiscard(Filter):
    """Trims end here: what is below keeps its space. ``owns``: closing it closes the child too."""

    def __init__(self, child: Node, *, owns: bool = False) -> None:
        super().__init__(child.name, child)
        self._owns = owns

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Nothing is discarded; FUA still means that what was written is stable."""
        if flags:
            self.next.flush()

    def close(self) -> None:
        """Close the child if it is ours."""
        if self._owns:
            self.next.close()
