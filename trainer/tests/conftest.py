"""What the tests of the trainer share is in helpers/suite.py."""

from __future__ import annotations

import pytest
import suite


def pytest_configure(config: pytest.Config) -> None:
    """The shared part, once, whichever folders are tested."""
    if not config.pluginmanager.has_plugin("suite"):
        config.pluginmanager.register(suite, "suite")
