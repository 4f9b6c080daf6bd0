"""A browser for tests, without a window."""

import json
import re
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


def asked(browser: Any) -> list[str]:
    """The addresses that were asked for since the last look."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def prefer(browser: Any, scheme: str) -> None:
    """Have pages shown dark or light."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def point_at(browser: Any, element: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).move_to_element(element).perform()


def rectangle(browser: Any, element: Any) -> list[float]:
    """Left, top, right, bottom in the window."""
    code = "const r = arguments[0].getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]"
    return browser.execute_script(code, element)


def contrast(ink: str, background: str) -> float:
    """Of two colours as rgb(…); 4.5 is enough for text (WCAG 2.2, AA)."""
    low, high = sorted(map(luminance, (ink, background)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of rgb(…), by WCAG's formula."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
