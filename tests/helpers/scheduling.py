"""A scheduler for pytest-xdist: long tests one by one, the others by file, the longest first.

`--dist loadgroup` of xdist 3.8 does not work: it marks groups in an attribute that pytest 9.2 no longer reads.
"""

from collections import Counter, defaultdict

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from helpers import durations

LONG_S = 8.0  # a longer test is a scope of its own
UNSPLIT = ("tests/inference/page/test_page.py",)  # one browser and one server for all its tests


def scope_of(nodeid: str, seconds: Counter[str]) -> str:
    """Return the scope of a test, which one worker runs: the test alone, or its file."""
    file, _, test = nodeid.partition("::")
    return nodeid if seconds[test] > LONG_S and file not in UNSPLIT else file


def order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests sorted by the recorded seconds of their scopes, the longest first."""
    seconds, scopes, totals = durations.read(), defaultdict[str, list[pytest.Item]](list), Counter[str]()
    for item in items:
        scope = scope_of(item.nodeid, seconds)
        scopes[scope].append(item)
        totals[scope] += seconds[item.nodeid.partition("::")[2]]
    return [item for scope in sorted(scopes, key=lambda scope: -totals[scope]) for item in scopes[scope]]


class LongestFirst(LoadScopeScheduling):
    """Scheduler of the scopes in the order of the tests."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False
        self.seconds = durations.read()

    def remove_node(self, node: WorkerController) -> str | None:
        """Give the remaining tests of a crashed worker to the others. Return the test that crashed, which is not repeated.

        The scheduler of xdist would send finished tests too, and a worker without a test of a file would wait forever.
        """
        remaining = {
            scope: {test: False for test, is_done in unit.items() if not is_done}
            for scope, unit in self.assigned_work.pop(node).items()
        }
        crashed = next((test for unit in remaining.values() for test in unit), None)
        if crashed is not None:
            del remaining[self._split_scope(crashed)][crashed]
            self.workqueue.update({scope: unit for scope, unit in remaining.items() if unit})
            for worker in self.assigned_work:
                self._reschedule(worker)
        return crashed

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid, self.seconds)
