"""A browser for tests, without a window."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by the system's chromedriver, so that nothing is downloaded."""
    lacking = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    lacking += [] if find_spec("selenium") else ["selenium"]
    if lacking:
        pytest.skip(f"no {', '.join(lacking)}: apt-get install chromium chromium-driver, pip install selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def resize(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def forget_logs(browser: Any) -> None:
    for log in ("performance", "browser"):
        browser.get_log(log)


def point_at(browser: Any, element: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).move_to_element(element).perform()
