"""Work on the results of a step that waits until the next step is dispatched."""

from collections.abc import Callable


class Late:
    """A queue of calls that read results of the last step, such as writing its report.

    Reading a result waits for the device. Called one step late, the device has the next step to
    work on meanwhile and never waits for the host.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def add(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def settle(self) -> None:
        """Make the calls, in order."""
        calls, self._calls = self._calls, []
        for call in calls:
            call()
