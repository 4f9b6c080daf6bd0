"""The page at /, in a browser: what a person does there, and what it keeps from happening."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsers import asked, contrast, forget_logs, point_at, prefer, rectangle, resize
from services import Service, httpx, service

from llama import SamplingParams

DOG = "What sound does a dog make?"
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>&amp;"
LONG = {"min_gen_len": 8000, "max_tokens": 8000}
ROOM = ("--max_seq_len", "8192")
# Bodies are kept, and fields added that the page has no setting for.
_LISTEN = """
    const fetched = fetch, more = arguments[0];
    window.bodies = [];
    window.fetch = (path, options) => {
        if (!options.body) return fetched(path, options);
        bodies.push(JSON.parse(options.body));
        return fetched(path, {...options, body: JSON.stringify({...bodies.at(-1), ...more})});
    };
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Service]:
    with service(*ROOM) as running:
        yield running


class Page:
    """The page of a service as it has just been opened, and what a person does with it."""

    def __init__(self, browser: Any, running: Service, width: int = 1000, height: int = 700) -> None:
        self.browser, self.url = browser, running.url
        resize(browser, width, height)
        forget_logs(browser)
        browser.get(f"{running.url}/")

    def run(self, code: str, *values: Any) -> Any:
        return self.browser.execute_script(code, *values)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def keys(self, *keys: str) -> None:
        """Press them where the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def with_shift(self, key: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def wait(self, true: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 30, 0.02).until(lambda _: true())

    def ask(self, text: str) -> str:
        """The answer to it, when it is there."""
        self.begin(text)
        return self.answer()

    def begin(self, text: str) -> None:
        self.run("text.value = arguments[0]; text.focus()", text)
        self.keys("\n")

    def answer(self) -> str:
        """The last one's text, when it has ended."""
        self.wait(lambda: self.run("return go.textContent") == "Send")
        return self.run("return [...document.querySelectorAll('.assistant > .text')].at(-1)?.textContent ?? ''")

    def texts(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('article > .text')].map(e => e.textContent)")

    def error(self) -> str:
        return self.run("return error.textContent")

    def tip(self) -> list[str]:
        """Its rows; none where it is hidden."""
        rows = "[...tip.querySelectorAll('div')].map(row => (row.className ? '✓ ' : '') + row.innerText)"
        return [" ".join(row.split()) for row in self.run(f"return tip.hidden ? [] : {rows}")]

    def reply(self, *data: Any, status: int = 200) -> None:
        """Have the next question answered so: by events, or by a body where the status is an error's."""
        events = "".join(f"data: {json.dumps(event) if event != '[DONE]' else event}\n\n" for event in data)
        body = events if status == 200 else json.dumps(data[0])
        self.run("const [body, status] = arguments; window.fetch = async () => new Response(body, {status})",
                 body, status)  # fmt: skip


@pytest.fixture
def page(browser: Any, served: Service) -> Page:
    return Page(browser, served)


def chunk(content: str, *tokens: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """An event of a stream."""
    logprobs = {"content": list(tokens)} if tokens else None
    return {"choices": [{"delta": {"content": content}, "logprobs": logprobs, "finish_reason": reason}]}


def token(data: bytes, *others: bytes) -> dict[str, Any]:
    """One that was taken, among others as probable."""
    each = [{"token": str(one), "bytes": list(one), "logprob": -1.0} for one in (data, *others)]
    return {**each[0], "top_logprobs": each}


# ----------------------------------------------------------------------------------------------------------- a talk


def test_an_answer_is_streamed_and_the_talk_goes_on(page: Page, served: Service) -> None:
    """Part by part, to the text that the service gives at once; the next question has it before it."""
    page.run(_LISTEN, {"temperature": 0})
    page.run("""
        window.seen = new Set();
        const see = () => seen.add(document.querySelector(".assistant .text")?.textContent ?? "");
        new MutationObserver(see).observe(log, {childList: true, subtree: true});
    """)
    page.wait(lambda: page.run("return model.textContent") == "demo")
    answer = page.ask("Tell me a story.")
    dialog = [{"role": "user", "content": "Tell me a story."}]
    whole = served.post("chat/completions", {"messages": dialog, "temperature": 0}).json()
    assert answer == whole["choices"][0]["message"]["content"]
    assert page.one(".assistant .facts").text == f"{whole['usage']['completion_tokens']} tokens"
    seen = page.run("return [...seen]")
    assert len(seen) > 5 and all(answer.startswith(part) for part in seen) and seen == sorted(seen, key=len)
    page.ask("And a cat?")
    asked_for = page.run("return bodies.at(-1).messages")
    assert asked_for == [*dialog, {"role": "assistant", "content": answer}, {"role": "user", "content": "And a cat?"}]
    assert page.error() == ""


def test_the_system_prompt_and_settings_are_sent(page: Page) -> None:
    """Only those that are filled in. What the empty ones show are the defaults."""
    page.run(_LISTEN, {})
    page.ask(DOG)
    plain = {"messages": [{"role": "user", "content": DOG}], "stream": True, "logprobs": True, "top_logprobs": 5}
    assert page.run("return bodies[0]") == plain
    given = {"temperature": 0.5, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "max_tokens": 3, "seed": 7,
             "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": -0.2}  # fmt: skip
    fields = {field.get_attribute("name"): field for field in page.all("#settings [type=number]")}
    assert fields.keys() == given.keys()
    defaults = SamplingParams()
    for name, field in fields.items():
        if (shown := field.get_attribute("placeholder")) not in ("no limit", "random"):
            assert float(shown) == getattr(defaults, name)
        page.run("arguments[0].value = arguments[1]", field, str(given[name]))
    page.run("system.value = 'Be brief.'")
    page.run("document.getElementById('new').click()")
    page.wait(lambda: not page.texts())
    page.ask(DOG)
    messages = [{"role": "system", "content": "Be brief."}, *plain["messages"]]
    assert page.run("return bodies[1]") == {**plain, **given, "messages": messages}
    assert page.one(".assistant .facts").text == "3 tokens, cut at the limit of tokens"
    assert page.error() == ""


def test_stop_keeps_what_is_there_and_frees_the_slot(page: Page, served: Service) -> None:
    before = served.metric("completion_tokens_total")
    page.run(_LISTEN, LONG)
    page.begin("Tell me a story.")
    page.wait(lambda: len(page.all(".token")) > 5)
    assert page.run("return go.textContent") == "Stop"
    page.one("#go").click()
    text = page.answer()
    served.wait_for("requests_running", 0, seconds=10)
    assert text and served.metric("completion_tokens_total") - before < LONG["min_gen_len"]
    assert page.one(".assistant .facts").text.endswith(", stopped") and page.error() == ""


def test_retry_asks_again_without_the_last_answer(page: Page) -> None:
    page.run(_LISTEN, {"temperature": 0})
    assert not page.one("#retry").is_enabled()
    page.ask(DOG)
    page.one("#retry").click()
    assert page.answer() == "A dog says woof."
    assert page.texts() == [DOG, "A dog says woof."]
    assert page.run("return JSON.stringify(bodies[0]) === JSON.stringify(bodies[1])")


def test_all_by_keyboard(page: Page) -> None:
    """Two lines are asked; tokens are walked through; an answer is asked again and stopped; a new chat is begun."""
    from selenium.webdriver import Keys

    page.run(_LISTEN, {"temperature": 0})
    page.keys("What sound does")
    page.with_shift(Keys.ENTER)
    page.keys("a dog make?", Keys.ENTER)
    assert page.answer() and page.texts()[0] == "What sound does\na dog make?"
    page.with_shift(Keys.TAB)
    first, second, *_, last = page.all(".token")
    for key, at in ((None, first), (Keys.ARROW_RIGHT, second), (Keys.END, last), (Keys.HOME, first)):
        page.keys(*([key] if key else []))
        assert page.browser.switch_to.active_element == at
        assert page.run("return [...document.querySelectorAll('.token')].filter(e => e.tabIndex === 0)") == [at]
        assert at.get_attribute("aria-describedby") == "tip" and len(page.tip()) == 5
        assert at.value_of_css_property("outline-style") == "solid"
    page.keys(Keys.TAB)
    assert page.browser.switch_to.active_element == page.one("#text") and page.tip() == []
    page.run(_LISTEN, LONG)
    page.keys(Keys.TAB, Keys.ENTER)
    page.wait(lambda: page.run("return go.textContent") == "Stop" and len(page.all(".token")) > 3)
    page.keys(Keys.ESCAPE)
    page.answer()
    assert page.one(".assistant .facts").text.endswith("stopped")
    seen = []
    for _ in range(40):
        page.with_shift(Keys.TAB)
        focused = page.browser.switch_to.active_element
        seen.append(focused.accessible_name)
        assert focused.value_of_css_property("outline-style") in ("solid", "auto")
        if focused == page.one("#new"):
            break
    assert {"Message", "Chat", "System prompt", "New chat"} <= set(seen) and all(seen)
    page.keys(Keys.ENTER)
    page.wait(lambda: not page.texts())
    assert page.browser.switch_to.active_element == page.one("#text")


# ----------------------------------------------------------------------------------------------------- the alternatives


def test_pointing_at_a_token_shows_what_else_could_have_stood_there(page: Page, served: Service) -> None:
    page.run(_LISTEN, {"temperature": 0})
    page.ask(DOG)
    body = {"messages": [{"role": "user", "content": DOG}], "temperature": 0, "logprobs": True, "top_logprobs": 5}
    tokens = served.post("chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    spans = page.all(".token")
    assert [span.get_property("textContent") for span in spans] == [bytes(one["bytes"]).decode() for one in tokens]
    for span, one in zip(spans, tokens, strict=True):
        point_at(page.browser, span)
        shown = [row.removeprefix("✓ ").split()[0] for row in page.tip()]
        assert shown == [bytes(o["bytes"]).decode().replace(" ", "␣") or o["token"] for o in one["top_logprobs"]]
        assert page.tip()[0].startswith("✓ ") and not any(row.startswith("✓") for row in page.tip()[1:])
    point_at(page.browser, page.one("header"))
    assert page.tip() == []


def test_tokens_that_are_no_whole_characters_stand_together(page: Page) -> None:
    """With the alternatives of each; a token that ends a text and begins a character ends it."""
    page.reply(
        chunk("\ufeff", token("\ufeff".encode())), chunk("a", token(b"a", b"")),
        chunk("猫!", token(b"\xe7", b"\n "), token(b"\x8c"), token(b"\xab!")), chunk(" \n", token(b" \n")),
        chunk("\ufffd", token(b"\xf0"), reason="stop"), "[DONE]",
    )  # fmt: skip
    assert page.ask("Cat?") == "\ufeffa猫! \n\ufffd"
    spans = page.all(".token")
    assert [span.get_property("textContent") for span in spans] == ["\ufeff", "a", "猫!", " \n", "\ufffd"]
    tips = []
    for span in spans:
        page.run("arguments[0].focus()", span)
        tips.append([row.split(" 36.8 %")[0] for row in page.tip()])
    assert tips == [
        ["✓ ‹U+FEFF›"], ["✓ a", "b''"], ["✓ <0xE7>", "↵␣", "✓ <0x8C>", "✓ <0xAB><0x21>"], ["✓ ␣↵"], ["✓ <0xF0>"],
    ]  # fmt: skip


def test_any_tokens_make_the_text_that_the_service_says(page: Page, served: Service) -> None:
    """Most tokens of a very high temperature are bytes that are no characters."""
    more = {"temperature": 1000, "top_p": 1, "seed": 5, "max_tokens": 200}
    page.run(_LISTEN, more)
    answer = page.ask(DOG)
    whole = served.post("chat/completions", {"messages": [{"role": "user", "content": DOG}], **more}).json()
    assert answer == whole["choices"][0]["message"]["content"] and "\ufffd" in answer
    counts = page.run("return [...document.querySelectorAll('.token')].map(span => span.tokens.length)")
    assert sum(counts) == whole["usage"]["completion_tokens"] and max(counts) > 1


# --------------------------------------------------------------------------------------------------------------- safety


def test_text_is_never_html(page: Page) -> None:
    """Neither a person's, nor a model's, nor a token's by its side, nor an error's."""
    half = HOSTILE.encode()
    page.reply(chunk(HOSTILE, token(half[:20], half), token(half[20:])), chunk(HOSTILE), "[DONE]")
    assert page.ask(HOSTILE) == HOSTILE * 2
    assert page.texts() == [HOSTILE, HOSTILE * 2]
    point_at(page.browser, page.one(".token"))
    assert HOSTILE.replace(" ", "␣") in page.tip()[1]
    page.reply({"error": {"message": HOSTILE}}, status=400)
    page.ask("b")
    assert page.error() == f"{HOSTILE} (400)"
    assert page.run("return document.querySelectorAll('img, body script').length") == 1  # its own
    assert page.browser.title == "llama" and page.browser.get_log("browser") == []


def test_nothing_is_asked_but_the_service_and_nothing_else_can_run(page: Page) -> None:
    from selenium.common.exceptions import JavascriptException

    page.ask(DOG)
    addresses = [address for address in asked(page.browser) if not address.startswith("data:")]
    assert addresses == [f"{page.url}/{path}" for path in ("", "v1/models", "v1/chat/completions")]
    assert page.browser.get_log("browser") == []
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        page.run("log.innerHTML = '<b>b</b>'")
    page.run("""
        log.append(Object.assign(new Image(), {src: "/health"}));
        document.createElement("p").setAttribute("style", "color: red");
        fetch("http://127.0.0.1:9/").catch(() => {});
    """)
    refusals: list[str] = []
    page.wait(
        lambda: refusals.extend(entry["message"] for entry in page.browser.get_log("browser")) or len(refusals) > 2
    )
    assert all(any(kind in said for said in refusals) for kind in ("connect-src", "style-src", "img-src"))


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_key_a_full_queue_and_the_end_of_the_service(browser: Any) -> None:
    with service("--api_key", "secret", "--max_batch_size", "1", "--max_queue", "0", *ROOM) as running:
        page = Page(browser, running)
        key = page.one("#key")
        page.wait(key.is_displayed)
        assert page.error() == "the API key is missing: send Authorization: Bearer KEY (401)"
        key.send_keys("wrong\n")
        page.wait(lambda: page.error() == "the API key is wrong (401)")
        key.clear()
        key.send_keys("secret\n")
        page.wait(lambda: page.run("return model.textContent") == "demo")
        assert page.error() == "" and page.browser.switch_to.active_element == page.one("#text")
        stored = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.run(stored) == [0, 0, "", f"{running.url}/"]

        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "Once", "stream": True, **LONG}
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as other:
            parts = other.iter_bytes()  # kept: what is dropped is closed
            assert next(parts)
            assert page.ask(DOG) == ""
            assert page.error().endswith("ask again later (429)")
        assert page.texts() == [DOG]
        page.run(_LISTEN, LONG)
        page.wait(lambda: running.http.get("/metrics", headers=headers).text.count("llama_requests_running 0"))
        page.one("#retry").click()
        page.wait(lambda: len(page.all(".token")) > 3)
        running.process.kill()
        assert page.answer() and page.error().startswith("The answer broke off: ")
        assert page.one(".assistant .facts").text.endswith(", broken off")
        page.one("#retry").click()
        assert page.answer() == "" and page.error() == "The service cannot be reached: is it still running?"
        assert page.texts() == [DOG]


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        ([{"error": {"message": "the service is ending"}}], 503, "the service is ending (503)"),
        ([chunk("a"), {"error": {"message": "no memory"}}, "[DONE]"], 200, "no memory"),
        ([chunk("a")], 200, "The answer broke off: the service has ended, or the connection to it."),
        (["no JSON of ours"], 502, "no reason given (502)"),
    ],
)
def test_errors_are_said_and_end_with_the_next_answer(page: Page, data: list[Any], status: int, said: str) -> None:
    """What came before one stays; a question without an answer makes room for the next one."""
    page.reply(*data, status=status)
    answer = page.ask("One?")
    assert (answer, page.error()) == ("a" if status == 200 else "", said)
    page.reply(chunk("Two."), "[DONE]")
    page.ask("Two?")
    assert page.texts() == [*(["One?", "a"] if answer else []), "Two?", "Two."] and page.error() == ""


def test_a_setting_that_is_no_number_is_not_sent(page: Page) -> None:
    page.run(_LISTEN, {})
    page.run("panel.open = false")
    page.run("document.querySelector('[name=top_k]').value = '1.5'")
    page.begin(DOG)
    assert page.run("return [bodies.length, panel.open, text.value]") == [0, True, DOG]
    assert page.browser.switch_to.active_element == page.one("[name=top_k]")


# ------------------------------------------------------------------------------------------------------------ its looks


def test_a_phones_width_is_enough(browser: Any, served: Service) -> None:
    """Nothing is cut or scrolled sideways, with the settings open and the alternatives shown."""
    page = Page(browser, served, 360, 640)
    assert not page.run("return panel.open")
    page.reply(chunk("x" * 400, token(b"x" * 400, b"y" * 400)), *[chunk("b", token(b"b ", b"c"))] * 99, "[DONE]")
    page.ask("w" * 400)
    page.reply({"error": {"message": "e" * 400}}, status=400)
    page.ask("b")
    for opened in (False, True):
        page.run("panel.open = arguments[0]", opened)
        assert page.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
            360,
            640,
        ]
        assert page.run("return log.scrollWidth <= log.clientWidth && settings.scrollWidth <= settings.clientWidth")
        for element in page.all("button, #text, #error, summary" + ", #system, #settings label:not([hidden])" * opened):
            left, _, right, _ = rectangle(browser, element)
            assert 0 <= left < right <= 360
    page.run("panel.open = false")
    for span in (page.all(".token")[0], page.all(".token")[-1]):
        page.run("arguments[0].focus()", span)
        left, top, right, bottom = rectangle(browser, page.one("#tip"))
        assert 0 <= left < right <= 360 and 0 <= top < bottom <= 640


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(page: Page, scheme: str) -> None:
    prefer(page.browser, scheme)
    page.reply(chunk("a", token(b"a", b"b")), chunk("", reason="length"), "[DONE]")
    page.ask("Hello")
    page.run("error.textContent = 'wrong'")
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    for selector in (".user", ".assistant", ".facts", "#error", "summary", "#settings small", "#go", "#text"):
        ink, own = (page.one(selector).value_of_css_property(name) for name in ("color", "background-color"))
        assert contrast(ink, ground if own.replace(" ", "").endswith(",0)") else own) >= 4.5, selector
