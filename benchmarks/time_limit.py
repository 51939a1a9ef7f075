"""Plugin for pytest: ``-p time_limit --seconds 100`` begins nothing after 100 seconds and says what was not begun."""

import time

import pytest

OUT_OF_TIME = 9  # exit code where nothing failed but something was not begun; pytest's own are 0 to 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="begin no test after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    if (seconds := config.getoption("seconds")) is not None:
        config.pluginmanager.register(TimeLimit(seconds))


class TimeLimit:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.reason = f"not begun, {seconds:.0f} s were over"
        self.not_begun: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() >= self.end:
            self.not_begun.append(item.nodeid)
            pytest.skip(self.reason)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in self.not_begun:
            terminalreporter.write_line(f"{self.reason}: {name}")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and self.not_begun:
            session.exitstatus = OUT_OF_TIME
