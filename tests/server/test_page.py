"""The page at / in a browser: a person asks, sees the answer come, stops it, asks again, and looks into it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browsers import forget_logs, point_at, resize
from services import Service, service

QUESTION, ANSWER = "What sound does a dog make?", "A dog says woof."


@pytest.fixture(scope="module")
def served() -> Iterator[Service]:
    with service("--max_seq_len", "512", "--api_key", "right") as running:
        running.http.headers["Authorization"] = "Bearer right"
        yield running


@pytest.fixture
def page(browser: Any, served: Service) -> Iterator[Any]:
    """The page, opened with its key; afterwards it has asked nobody but the service, and broken no policy."""
    resize(browser, 1000, 700)
    forget_logs(browser)
    browser.get(served.url)
    wait(browser, "return !document.getElementById('lock').hidden")
    write(browser, "key", "right\n")
    wait(browser, "return document.getElementById('model').textContent === 'demo'")
    fill(browser, "temperature", "0")
    yield browser
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith((served.url + "/", "data:")) for url in asked), asked
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert not [message for message in said if "Content Security Policy" in message or "Uncaught" in message], said


def wait(browser: Any, condition: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.05).until(lambda driver: driver.execute_script(condition), condition)


def keys(browser: Any, *pressed: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*pressed).perform()


def write(browser: Any, name: str, text: str) -> None:
    """Into a field, a character at a time as people do."""
    browser.find_element("id", name).send_keys(text)


def fill(browser: Any, name: str, value: str) -> None:
    field = browser.find_element("name", name)
    field.clear()
    field.send_keys(value)


def ask(browser: Any, text: str) -> None:
    write(browser, "text", text + "\n")


def answers(browser: Any) -> list[str]:
    """The texts of the answers that have ended."""
    wait(browser, "return document.getElementById('go').textContent === 'Send'")
    return [one.text for one in browser.find_elements("css selector", ".assistant .text")]


def test_a_talk_and_what_else_could_have_been_said(page: Any, served: Service) -> None:
    """Answers are the service's own; pointing at a token, or the keyboard, shows what else could have stood there."""
    from selenium.webdriver import Keys

    ask(page, QUESTION)
    assert answers(page) == [ANSWER]
    tokens = page.find_elements("css selector", ".token")
    assert "".join(page.execute_script("return arguments[0].map(t => t.textContent)", tokens)) == ANSWER
    point_at(page, tokens[1])
    tip = page.find_element("id", "tip")
    rows = tip.text.splitlines()
    assert tip.is_displayed() and len([row for row in rows if row.endswith("%")]) >= 5, rows
    assert len(tip.find_elements("class name", "taken")) == 1
    point_at(page, page.find_element("id", "model"))
    assert not tip.is_displayed()
    page.find_element("id", "log").click()
    keys(page, Keys.TAB)
    assert page.switch_to.active_element == tokens[0] and tip.is_displayed()
    keys(page, Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == tokens[1]
    ask(page, "And a cat?")
    assert len(answers(page)) == 2
    page.find_element("id", "retry").click()
    assert len(answers(page)) == 2  # greedy: the last answer again, in its place
    page.find_element("id", "new").click()
    wait(page, "return !document.querySelector('article')")


def test_stop_ends_the_request(page: Any, served: Service) -> None:
    """By Escape; what had come stays, and the slot is free again."""
    from selenium.webdriver import Keys

    fill(page, "temperature", "1.9")
    for _ in range(20):  # an answer may end by itself
        ask(page, "Tell me a long story.")
        wait(page, "return document.querySelector('.assistant:last-child .token')")
        keys(page, Keys.ESCAPE)
        answers(page)
        if "stopped" in page.find_elements("class name", "facts")[-1].text:
            break
    else:
        raise AssertionError("nothing could be stopped")
    served.wait_for("requests_running", 0)


def test_text_is_text(page: Any) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    ask(page, hostile)
    answers(page)
    assert page.find_element("css selector", ".user .text").text == hostile
    assert page.title == "llama" and not page.find_elements("css selector", "#log img, #log script")


def test_settings_are_sent(page: Any) -> None:
    """The system prompt and each field that is filled in, under the service's names."""
    write(page, "system", "Be brief.")
    fill(page, "max_tokens", "3")
    page.execute_script(
        "const own = fetch; window.fetch = (path, what) => { window.sent = what?.body ?? window.sent;"
        " return own(path, what); }"
    )
    ask(page, QUESTION)
    answers(page)
    sent = json.loads(page.execute_script("return window.sent"))
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0, 3) and "top_p" not in sent
    assert "3 tokens, cut at the limit" in page.find_element("class name", "facts").text


def test_a_phones_width(page: Any) -> None:
    """Nothing is wider than the window, long words and alternatives included."""
    resize(page, 360, 640)
    ask(page, "x" * 90)
    answers(page)
    point_at(page, page.find_elements("css selector", ".token")[-1])
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    code = "const r = arguments[0].getBoundingClientRect(); return [r.left, r.top, 360 - r.right, 640 - r.bottom]"
    for name in ("tip", "text", "go", "retry", "new"):
        assert min(page.execute_script(code, page.find_element("id", name))) >= 0, name


def test_errors_are_a_line(browser: Any) -> None:
    """A service that asks for a key, what it refuses, and one that has ended."""
    with service("--api_key", "right") as running:
        browser.get(running.url)
        error = browser.find_element("id", "error")
        wait(browser, "return document.getElementById('error').textContent.includes('401')")
        write(browser, "key", "wrong\n")
        wait(browser, "return document.getElementById('error').textContent.includes('401')")
        browser.find_element("id", "key").clear()
        write(browser, "key", "right\n")
        wait(browser, "return document.getElementById('error').textContent === ''")
        fill(browser, "temperature", "-1")
        ask(browser, QUESTION)
        wait(browser, "return document.getElementById('error').textContent.includes('temperature')")
        assert "400" in error.text
        running.end()
        fill(browser, "temperature", "0")
        ask(browser, QUESTION)
        wait(browser, "return document.getElementById('error').textContent.includes('cannot be reached')")
